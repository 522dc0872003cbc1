import math

import pytest
import torch

from hydra.layers.rotary import apply_rotary, compute_rotary
from hydra.testing.specs import random_activations
from hydra.testing.tolerances import assert_close


def test_a_plane_turns_by_its_angle() -> None:
    """Width 4, base 100: planes (0, 2) and (1, 3) turn by position and by position / 10."""
    cos, sin = compute_rotary(torch.tensor([[3]]), 4, 100.0, torch.float64)
    x = torch.tensor([1.0, 0.0, 0.0, 2.0], dtype=torch.float64).view(1, 1, 1, 4)
    expected = torch.tensor([math.cos(3.0), -2 * math.sin(0.3), math.sin(3.0), 2 * math.cos(0.3)], dtype=torch.float64)
    assert_close(apply_rotary(x, cos, sin)[0, 0, 0], expected, torch.float64)


def test_norms_stay_and_channels_beyond_the_width_pass() -> None:
    x_BTNH = random_activations(2, 5, 3, 8)
    out_BTNH = apply_rotary(x_BTNH, *compute_rotary(torch.arange(5)[None], 4, 50.0, torch.float64))
    assert_close(out_BTNH.norm(dim=-1), x_BTNH.norm(dim=-1), torch.float64)
    assert torch.equal(out_BTNH[..., 4:], x_BTNH[..., 4:])
    assert not torch.equal(out_BTNH[:, 1:, :, :4], x_BTNH[:, 1:, :, :4])


def test_rows_may_have_positions_of_their_own() -> None:
    x_BTNH = random_activations(2, 5, 3, 8)
    positions_BT = torch.stack([torch.arange(5), torch.arange(5) + 7])
    both = apply_rotary(x_BTNH, *compute_rotary(positions_BT, 8, 50.0, torch.float64))
    for row in range(2):
        alone = apply_rotary(
            x_BTNH[row : row + 1], *compute_rotary(positions_BT[row : row + 1], 8, 50.0, torch.float64)
        )
        assert torch.equal(both[row : row + 1], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_angles_are_at_least_float32_and_the_input_keeps_its_dtype(dtype: torch.dtype) -> None:
    cos, sin = compute_rotary(torch.tensor([[1001]]), 8, 10000.0, dtype)
    assert cos.dtype == sin.dtype == torch.float32
    assert apply_rotary(torch.ones(1, 1, 1, 8, dtype=dtype), cos, sin).dtype == dtype
    # In bfloat16 position 1001 would be 1000, a radian off.
    assert cos[0, 0, 0, 0].item() == pytest.approx(math.cos(1001.0), abs=1e-4)

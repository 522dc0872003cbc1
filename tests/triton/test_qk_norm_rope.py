"""Norm, temperature and rotary embedding in one kernel against the reference, at head widths that fill no block."""

import pytest
import torch
from torch import Tensor

from hydra.errors import ConfigError
from hydra.kernels.qk_norm_rope import qk_norm_rope
from hydra.kernels.reference import qk_norm_rope as reference
from hydra.layers.rotary import compute_rotary
from hydra.testing.operators import check_operator, inside_nan
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401
from hydra.testing.specs import random_activations

pytestmark = pytest.mark.usefixtures("nan_poisoned_memory")
FORMS = [(None, False), (1e-6, False), (1e-24, True), (None, True)]


def angles(n_batch: int, n_tokens: int, width: int) -> tuple[Tensor, Tensor]:
    positions_BT = torch.arange(n_batch * n_tokens).view(n_batch, n_tokens)
    cos_BT1R, sin_BT1R = compute_rotary(positions_BT, width, 10_000.0, torch.float32)
    return inside_nan(cos_BT1R[:, :, 0])[:, :, None], inside_nan(sin_BT1R[:, :, 0])[:, :, None]


def check(x_BTNH: Tensor, rotary: tuple[Tensor, Tensor], norm_eps: float | None, has_temp: bool) -> None:
    temp_N = inside_nan(random_activations(x_BTNH.shape[2], dtype=x_BTNH.dtype, seed=1))
    inputs, names = ([x_BTNH, temp_N], ["x", "temp"]) if has_temp else ([x_BTNH], ["x"])
    check_operator(
        lambda x, temp=None: qk_norm_rope(x, *rotary, norm_eps=norm_eps, temp_N=temp, kernels="triton"),
        lambda x, temp=None: reference.qk_norm_rope(x, *rotary, norm_eps, temp),
        inputs,
        names,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("norm_eps", "has_temp"), FORMS)
@pytest.mark.parametrize(
    ("shape", "rotated"), [((1, 1, 1, 2), 2), ((2, 5, 3, 8), 8), ((2, 7, 4, 20), 12), ((1, 40, 5, 64), 32)], ids=str
)
def test_output_and_gradients(
    shape: tuple[int, int, int, int], rotated: int, norm_eps: float | None, has_temp: bool, dtype: torch.dtype
) -> None:
    if shape[-1] == 2 and norm_eps is not None:
        norm_eps = 0.5  # of two channels the norm leaves an angle, and of its gradient only rounding
    check(inside_nan(random_activations(*shape, dtype=dtype)), angles(1, shape[1], rotated), norm_eps, has_temp)


def test_rows_of_a_batch_have_positions_of_their_own() -> None:
    check(random_activations(3, 4, 2, 8, dtype=torch.float32), angles(3, 4, 8), 1e-6, False)


def test_heads_are_taken_as_they_lie() -> None:
    """Behind a transposition, and as part of a joint product."""
    x_BTNH = random_activations(2, 3, 5, 8, dtype=torch.float32).transpose(1, 2)
    check(x_BTNH, angles(1, 5, 8), 1e-6, True)
    joint_BTNH = random_activations(2, 5, 6, 8, dtype=torch.float32)
    check(joint_BTNH[:, :, 4:], angles(1, 5, 8), 1e-6, True)
    check(random_activations(2, 8, 3, 5, dtype=torch.float32).permute(0, 3, 2, 1), angles(1, 5, 8), 1e-6, True)


def test_heads_of_zeros_stay_zeros() -> None:
    x = torch.zeros(1, 2, 3, 8)
    assert (qk_norm_rope(x, *angles(1, 2, 8), norm_eps=1e-24, kernels="triton") == 0).all()


def test_what_the_kernels_cannot_take_is_refused() -> None:
    x = torch.ones(1, 2, 3, 8)
    with pytest.raises(ConfigError, match="float64"):
        qk_norm_rope(x.double(), *angles(1, 2, 8), norm_eps=None, kernels="triton")
    wide = torch.ones(1, 2, 1, 2048)
    with pytest.raises(ConfigError, match="1024"):
        qk_norm_rope(wide, *angles(1, 2, 8), norm_eps=None, kernels="triton")


def test_the_operator_keeps_torchs_rules() -> None:
    x = random_activations(1, 3, 2, 8, dtype=torch.float32).requires_grad_()
    temp = random_activations(2, dtype=torch.float32).requires_grad_()
    rotary = tuple(tensor.contiguous() for tensor in angles(1, 3, 8))
    torch.library.opcheck(torch.ops.hydra.qk_norm_rope.default, (x, *rotary, 1e-6, temp))
    torch.library.opcheck(torch.ops.hydra.qk_norm_rope.default, (x, *rotary, None, None))

"""RMSNorm's kernels against the reference, at widths and row counts that fill no tile."""

import pytest
import torch

from hydra.errors import ConfigError
from hydra.kernels.reference import rms_norm as reference
from hydra.kernels.rms_norm import rms_norm
from hydra.testing.operators import check_operator, inside_nan
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401
from hydra.testing.specs import random_activations

pytestmark = pytest.mark.usefixtures("nan_poisoned_memory")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "eps"),
    [((1, 1), 0.5), ((3, 7), 1e-2), ((2, 5, 32), 1e-6), ((300, 33), 1e-2), ((5, 1500), 1e-6), ((3, 2304), 1e-6)],
    ids=str,
)
def test_output_and_gradients(shape: tuple[int, ...], eps: float, dtype: torch.dtype) -> None:
    x = inside_nan(random_activations(*shape, dtype=dtype))
    weight = inside_nan(random_activations(shape[-1], dtype=dtype, seed=1))
    check_operator(
        lambda x, weight: rms_norm(x, weight, eps, "triton"),
        lambda x, weight: reference.rms_norm(x, weight, eps),
        [x, weight],
        ["x", "weight"],
    )


def test_rows_of_zeros_give_zeros_and_finite_gradients() -> None:
    x = torch.zeros(3, 10, requires_grad=True)
    weight = torch.ones(10, requires_grad=True)
    y = rms_norm(x, weight, 1e-6, "triton")
    grads = torch.autograd.grad(y.sum(), [x, weight])
    assert (y == 0).all()
    assert all(grad.isfinite().all() for grad in grads)


def test_no_rows() -> None:
    x, weight = torch.zeros(0, 10, requires_grad=True), torch.ones(10, requires_grad=True)
    y = rms_norm(x, weight, 1e-6, "triton")
    grads = torch.autograd.grad(y.sum(), [x, weight])
    assert y.shape == grads[0].shape == (0, 10)
    assert (grads[1] == 0).all()


def test_transposed_rows() -> None:
    """No view of them has contiguous rows."""
    x = random_activations(7, 4, 6, dtype=torch.float32).transpose(0, 2)
    check_operator(
        lambda x, weight: rms_norm(x, weight, 1e-6, "triton"),
        lambda x, weight: reference.rms_norm(x, weight, 1e-6),
        [x, random_activations(7, dtype=torch.float32)],
        ["x", "weight"],
    )


def test_what_the_kernels_cannot_take_is_refused() -> None:
    with pytest.raises(ConfigError, match="float64"):
        rms_norm(torch.ones(2, 3, dtype=torch.float64), torch.ones(3), 1e-6, "triton")
    with pytest.raises(ConfigError, match="8192"):
        rms_norm(torch.ones(1, 8193), torch.ones(8193), 1e-6, "triton")


def test_the_operator_keeps_torchs_rules() -> None:
    """Schema, fake tensors, autograd registration and tracing, by torch's own checks."""
    x = random_activations(5, 12, dtype=torch.float32).requires_grad_()
    weight = random_activations(12, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(torch.ops.hydra.rms_norm.default, (x, weight, 1e-6))

"""How far two ways of computing the same may differ, by dtype. Never widened to make one test pass."""

import torch
from torch import Tensor

MAX_RELATIVE_ERROR = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Largest absolute error over the largest expected magnitude; bfloat16: Frobenius norm of the error over that of the
expected tensor."""


def relative_error(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """The error as MAX_RELATIVE_ERROR measures it; NaN when there is one."""
    difference, expected = actual.double() - expected.double(), expected.double()
    if dtype == torch.bfloat16:
        error, size = difference.norm(), expected.norm()
    else:
        error, size = difference.abs().max(), expected.abs().max()
    return 0.0 if error == 0 else (error / size).item()


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "tensors") -> None:
    """Fail unless actual equals expected within what computing in `dtype` may cost; NaN and infinities always fail."""
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    error = relative_error(actual, expected, dtype)
    # Written so that a NaN fails.
    assert error <= MAX_RELATIVE_ERROR[dtype], (
        f"{what} must agree within {MAX_RELATIVE_ERROR[dtype]} in {dtype}, but got {error:.3e}"
    )

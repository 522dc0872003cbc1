"""SwiGLU's gate and squared ReLU against their references, at widths and row counts that fill no tile."""

import pytest
import torch

from hydra.errors import ConfigError
from hydra.kernels.reference import squared_relu as squared_relu_reference
from hydra.kernels.reference import swiglu as swiglu_reference
from hydra.kernels.squared_relu import squared_relu
from hydra.kernels.swiglu import swiglu
from hydra.testing.operators import check_operator, inside_nan
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401
from hydra.testing.specs import random_activations

pytestmark = pytest.mark.usefixtures("nan_poisoned_memory")
SHAPES = [(1, 1), (3, 7), (2, 5, 64), (70, 33), (2, 1300)]
DTYPES = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = (inside_nan(3 * random_activations(*shape, dtype=dtype, seed=seed)) for seed in (0, 1))
    check_operator(lambda gate, up: swiglu(gate, up, "triton"), swiglu_reference.swiglu, [gate, up], ["gate", "up"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squared_relu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = inside_nan(random_activations(*shape, dtype=dtype))
    check_operator(lambda x: squared_relu(x, "triton"), squared_relu_reference.squared_relu, [x], ["x"])


def test_halves_of_one_product_are_taken_as_they_lie() -> None:
    """Gate and up of one joint matrix product are strided views."""
    joint = random_activations(5, 2 * 24, dtype=torch.float32)
    gate, up = joint.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(gate, up, "triton"), swiglu_reference.swiglu(gate, up).float())


def test_far_from_zero_nothing_overflows() -> None:
    x = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    y = swiglu(x, torch.ones(4), "triton")
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == [0.0, 0.0, 100.0, 1e4]
    assert grad.tolist() == [0.0, 0.0, 1.0, 1.0]


def test_a_nan_stays_one() -> None:
    assert squared_relu(torch.tensor([[torch.nan, 1.0]]), "triton").isnan().tolist() == [[True, False]]


def test_what_the_kernels_cannot_take_is_refused() -> None:
    ones = torch.ones(2, 3)
    with pytest.raises(ConfigError, match="float64"):
        squared_relu(ones.double(), "triton")
    with pytest.raises(ConfigError, match="one shape"):
        swiglu(ones, torch.ones(2, 4), "triton")


def test_the_operators_keep_torchs_rules() -> None:
    x = random_activations(5, 12, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(torch.ops.hydra.squared_relu.default, (x,))
    torch.library.opcheck(torch.ops.hydra.swiglu.default, (x, x.detach().clone().requires_grad_()))

"""Products of one input become one call that computes the same."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from hydra.kernels.decode import load_native, native_linear
from hydra.kernels.joint_products import JoinProducts
from hydra.model.framework.quantisation import round_to_int8
from hydra.testing.specs import random_activations

SIZES = (5, 61, 4)


def traced_and_joined(function: Callable[..., list[Tensor]], *arguments: Tensor) -> tuple[torch.fx.GraphModule, int]:
    """The joined graph, and how many products it had before."""
    module = make_fx(function, tracing_mode="fake")(*arguments)
    n_before = n_products(module)
    JoinProducts()(module.graph)
    module.graph.lint()
    module.recompile()
    return module, n_before


def n_products(module: torch.fx.GraphModule) -> int:
    return len(module.graph.find_nodes(op="call_function", target=torch.ops.hydra.decode_linear.default))


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("is_int8", [False, True], ids=["bfloat16", "int8"])
def test_they_become_one(is_int8: bool, n_threads: int) -> None:
    load_native(n_threads)
    x_B1I = random_activations(3, 1, 40, dtype=torch.bfloat16)
    weights = [random_activations(size, 40, dtype=torch.float32, seed=size) for size in SIZES]
    operands = [weight.bfloat16() for weight in weights]
    if is_int8:
        operands = [part for weight in weights for part in vars(round_to_int8(weight)).values()]

    def together(x: Tensor, *operands: Tensor) -> list[Tensor]:
        step = 2 if is_int8 else 1
        return [native_linear(x, *operands[start : start + step]) for start in range(0, len(operands), step)]

    module, n_before = traced_and_joined(together, x_B1I, *operands)
    assert (n_before, n_products(module)) == (3, 1)
    for out, expected in zip(module(x_B1I, *operands), together(x_B1I, *operands), strict=True):
        assert torch.equal(out, expected)


def test_other_inputs_and_computed_weights_are_left_alone() -> None:
    load_native(1)
    x, w = random_activations(1, 1, 8, dtype=torch.float32), random_activations(4, 8, dtype=torch.float32)

    def apart(x: Tensor, w: Tensor) -> list[Tensor]:
        return [native_linear(x, w), native_linear(x + 1, w), native_linear(x, w + 1)]

    module, n_before = traced_and_joined(apart, x, w)
    assert n_before == n_products(module) == 3
    for out, expected in zip(module(x, w), apart(x, w), strict=True):
        assert torch.equal(out, expected)

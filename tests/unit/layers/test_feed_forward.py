import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hydra.layers.feed_forward import SquaredReLU, SwiGLU
from hydra.testing.specs import random_activations, randomise
from hydra.testing.tolerances import assert_close


def test_swiglu_follows_its_formula() -> None:
    layer, x_BTD = SwiGLU(6, 10).double(), random_activations(2, 3, 6)
    randomise(layer)
    gate, up = x_BTD @ layer.gate.weight.T, x_BTD @ layer.up.weight.T
    expected = (gate / (1 + torch.exp(-gate)) * up) @ layer.down.weight.T
    assert_close(layer(x_BTD), expected, torch.float64)


def test_squared_relu_follows_its_formula() -> None:
    layer, x_BTD = SquaredReLU(6, 10).double(), random_activations(2, 3, 6)
    randomise(layer)
    expected = (x_BTD @ layer.up.weight.T).clamp(min=0) ** 2 @ layer.down.weight.T
    assert_close(layer(x_BTD), expected, torch.float64)


@pytest.mark.parametrize(("layer_class", "n_matrices"), [(SwiGLU, 3), (SquaredReLU, 2)])
def test_counts(layer_class: type[SwiGLU] | type[SquaredReLU], n_matrices: int) -> None:
    layer = layer_class(6, 10)
    assert sum(parameter.numel() for parameter in layer.parameters()) == n_matrices * 60
    with FlopCounterMode(display=False) as counter:
        layer(torch.ones(2, 7, 6))
    assert counter.get_total_flops() == layer.flops(14) == 2 * n_matrices * 60 * 14

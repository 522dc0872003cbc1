"""ccgqa against its reference: outputs, every gradient, state of the cache, at odd lengths, in NaN-poisoned memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hydra.attention.backends.ccgqa.attention import CompressedConvolutionalAttention
from hydra.attention.backends.ccgqa.reference import compute_reference, convolve
from hydra.kernels.cca_convolution import convolve_causally
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401
from hydra.testing.specs import build_random_layer, document_ids, random_activations
from hydra.testing.tolerances import assert_close

SHAPES = {
    "ccgqa": {"n_query_heads": 4, "n_kv_heads": 2},
    "cca": {"n_query_heads": 2, "n_kv_heads": 2, "conv_kernel_0": 3, "conv_kernel_1": 2},
    "one-key-head": {"n_query_heads": 3, "n_kv_heads": 1, "conv_kernel_0": 2, "conv_kernel_1": 4},
    "half-rotary": {"n_query_heads": 2, "n_kv_heads": 1, "conv_kernel_0": 1, "rotary_fraction": 0.5},
}
LENGTHS = [(1,), (2,), (7,), (5, 1, 2, 3)]

pytestmark = pytest.mark.usefixtures("nan_poisoned_memory")


def build(shape: str, dtype: torch.dtype) -> CompressedConvolutionalAttention:
    options: dict[str, Any] = {"rope_base": 300.0, **SHAPES[shape]}
    layer = build_random_layer("ccgqa", 32, 8, dtype, **options)
    assert isinstance(layer, CompressedConvolutionalAttention)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_layer_equals_reference(lengths: tuple[int, ...], shape: str, dtype: torch.dtype) -> None:
    layer = build(shape, dtype)
    ids_BT = document_ids(*lengths).expand(2, -1) if len(lengths) > 1 else None
    x_BTD = random_activations(2, sum(lengths), 32, dtype=dtype).requires_grad_()
    weight_BTD = random_activations(2, sum(lengths), 32, dtype=dtype, seed=1)
    parameters = dict(layer.named_parameters())
    inputs = [x_BTD, *parameters.values()]

    out_BTD = layer(x_BTD, document_ids_BT=ids_BT)
    grads = torch.autograd.grad((out_BTD * weight_BTD).sum(), inputs)
    expected = compute_reference(parameters, layer.spec, x_BTD, ids_BT)
    expected_loss = (expected.out_BTD * weight_BTD).sum()
    expected_grads = torch.autograd.grad(expected_loss, inputs, materialize_grads=True)

    assert_close(out_BTD, expected.out_BTD, dtype, "outputs")
    for name, grad, expected_grad in zip(["x", *parameters], grads, expected_grads, strict=True):
        if sum(lengths) == 1 and name not in ("x", "v_proj.weight", "o_proj.weight"):
            # One token attends to itself whatever its query and key are: gradients are rounding around zero.
            assert grad.abs().max() < 1e-5, name
        else:
            assert_close(grad, expected_grad, dtype, name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@torch.no_grad()
def test_cache_state_equals_reference(lengths: tuple[int, ...], shape: str) -> None:
    layer = build(shape, torch.float64)
    n_tokens = sum(lengths)
    ids_BT = document_ids(*lengths).expand(2, -1)
    x_BTD = random_activations(2, n_tokens, 32)
    expected = compute_reference(dict(layer.named_parameters()), layer.spec, x_BTD, ids_BT)
    for split in ([n_tokens], [1] * n_tokens):
        cache = layer.new_cache(2, n_tokens + 3)
        for x, ids in zip(x_BTD.split(split, dim=1), ids_BT.split(split, dim=1), strict=True):
            layer(x, cache=cache, document_ids_BT=ids)
        assert_close(cache.k_BKSH[:, :, :n_tokens].transpose(1, 2), expected.k_BTKH, torch.float64, "keys")
        assert_close(cache.v_BKSH[:, :, :n_tokens].transpose(1, 2), expected.v_BTKH, torch.float64, "values")
        assert_close(cache.past_v_B1V, expected.v_previous_BTV[:, -1:], torch.float64, "previous value")
        n_past = layer.spec.n_past_columns
        padded_u = torch.cat([torch.zeros(2, n_past, expected.u_BTC.shape[2]), expected.u_BTC], dim=1)
        if n_past:
            assert_close(cache.past_u_BRC, padded_u[:, -n_past:], torch.float64, "convolution state")


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_convolutions_equal_those_of_torch(shape: str) -> None:
    """The reference's loops and our matrix products both stand for nn.Conv1d with one pad on the left."""
    layer = build(shape, torch.float64)
    spec, x_BTD = layer.spec, random_activations(2, 9, 32)
    u_BTC = torch.cat([layer.q_proj(x_BTD), layer.k_proj(x_BTD)], dim=-1)
    padded_BCP = F.pad(u_BTC.transpose(1, 2), (spec.n_past_columns, 0))
    expected_BTC = layer.conv1(layer.conv0(padded_BCP)).transpose(1, 2)
    weights = layer.conv0.weight, layer.conv0.bias, layer.conv1.weight, layer.conv1.bias
    ours = convolve_causally(padded_BCP.transpose(1, 2), *weights, None).flatten(2)
    assert_close(ours, expected_BTC, torch.float64, "convolutions")
    slow = torch.stack([convolve(dict(layer.named_parameters()), spec, u_TC) for u_TC in u_BTC])
    assert_close(slow, expected_BTC, torch.float64, "convolutions of the reference")

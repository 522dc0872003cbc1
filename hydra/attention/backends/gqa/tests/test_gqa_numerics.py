"""gqa against its reference: outputs, every gradient, cached keys, at odd lengths, in NaN-poisoned memory."""

import pytest
import torch

from hydra.attention.backends.gqa.reference import compute_reference
from hydra.attention.backends.gqa.spec import GQASpec
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401
from hydra.testing.specs import build_random_layer, document_ids, random_activations
from hydra.testing.tolerances import assert_close

LENGTHS = [(1,), (7,), (13,), (5, 1, 7)]


@pytest.mark.usefixtures("nan_poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
def test_layer_equals_reference(qk_norm: bool, lengths: tuple[int, ...], n_kv_heads: int, dtype: torch.dtype) -> None:
    layer = build_random_layer("gqa", 24, 4, dtype, n_kv_heads=n_kv_heads, rope_base=300.0, qk_norm=qk_norm)
    assert isinstance(layer.spec, GQASpec)
    ids_BT = document_ids(*lengths).expand(2, -1) if len(lengths) > 1 else None
    x_BTD = random_activations(2, sum(lengths), 24, dtype=dtype).requires_grad_()
    weight_BTD = random_activations(2, sum(lengths), 24, dtype=dtype, seed=1)
    inputs = [x_BTD, *layer.parameters()]

    out_BTD = layer(x_BTD, document_ids_BT=ids_BT)
    grads = torch.autograd.grad((out_BTD * weight_BTD).sum(), inputs)
    expected_BTD = compute_reference(dict(layer.named_parameters()), layer.spec, x_BTD, ids_BT)
    expected_grads = torch.autograd.grad((expected_BTD * weight_BTD).sum(), inputs)

    assert_close(out_BTD, expected_BTD, dtype, "outputs")
    # Softmax over one key does not depend on queries and keys: their gradient is rounding, nothing to be relative to.
    names = ["x", *(name for name, _ in layer.named_parameters())]
    for name, grad, expected in zip(names, grads, expected_grads, strict=True):
        if sum(lengths) == 1 and name in ("q_proj.weight", "k_proj.weight"):
            assert grad.abs().max() < 1e-5
        else:
            assert_close(grad, expected, dtype, name)

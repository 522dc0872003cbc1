"""mla against its reference: outputs, every gradient, what is cached, at odd lengths, in NaN-poisoned memory."""

import pytest
import torch

from hydra.attention.backends.mla import attention
from hydra.attention.backends.mla.attention import LatentAttention, is_absorbed
from hydra.attention.backends.mla.reference import compute_reference
from hydra.attention.core import DECODE_KERNEL, KERNELS
from hydra.attention.masks import AttentionContext, TokenHistory, build_context
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401
from hydra.testing.specs import build_random_layer, document_ids, random_activations
from hydra.testing.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("nan_poisoned_memory")
CPU_KERNELS = [kernel for kernel in KERNELS if kernel not in ("flex", "flash")]
LENGTHS = [(1,), (7,), (13,), (5, 1, 7)]
SHAPES = {
    "v2_lite": {"q_latent_width": 0},
    "v3": {"q_latent_width": 9},
    "wide_values": {"q_latent_width": 0, "value_width": 11},
    "no_rotation": {"q_latent_width": 9, "rotary_width": 0},
}


def build(dtype: torch.dtype, **changes: int) -> LatentAttention:
    options = {"kv_latent_width": 10, "nope_width": 5, "rotary_width": 4, "value_width": 7, "rope_base": 300.0}
    layer = build_random_layer("mla", 24, 3, dtype, **{**options, **changes})
    assert isinstance(layer, LatentAttention)
    return layer


def choose_form(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(attention, "is_absorbed", lambda spec, n_tokens, n_past: form == "absorbed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("form", [*CPU_KERNELS, "absorbed"])
def test_layer_equals_reference(
    form: str, lengths: tuple[int, ...], shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The naive form on every kernel, and the absorbed one."""
    choose_form(monkeypatch, form)
    layer = build(dtype, **SHAPES[shape])
    ids_BT = document_ids(*lengths).expand(2, -1) if len(lengths) > 1 else None
    x_BTD = random_activations(2, sum(lengths), 24, dtype=dtype).requires_grad_()
    weight_BTD = random_activations(2, sum(lengths), 24, dtype=dtype, seed=1)
    inputs = [x_BTD, *layer.parameters()]

    kernel = "scaled_dot_product" if form == "absorbed" else form
    out_BTD = layer(x_BTD, layer.prepare(build_context(x_BTD, document_ids_BT=ids_BT, kernel=kernel)))
    grads = torch.autograd.grad((out_BTD * weight_BTD).sum(), inputs)
    expected_BTD = compute_reference(dict(layer.named_parameters()), layer.spec, x_BTD, ids_BT).out_BTD
    expected_grads = torch.autograd.grad((expected_BTD * weight_BTD).sum(), inputs)

    assert_close(out_BTD, expected_BTD, dtype, "outputs")
    names = ["x", *(name for name, _ in layer.named_parameters())]
    for name, grad, expected in zip(names, grads, expected_grads, strict=True):
        # Softmax over one key does not depend on queries: their gradient is rounding, nothing to be relative to.
        if sum(lengths) == 1 and name.startswith("q_"):
            assert grad.abs().max() < 1e-5
        else:
            assert_close(grad, expected, dtype, name)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("split", [(11,), (6, 1, 1, 3), (1, 4, 6)], ids=str)
@pytest.mark.parametrize("form", ["naive", "absorbed", "chosen"])
def test_cached_calls_equal_reference(
    form: str, split: tuple[int, ...], packed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs, and what the cache holds afterwards."""
    if form != "chosen":
        choose_form(monkeypatch, form)
    layer, x_BTD = build(dtype), random_activations(2, 11, 24, dtype=dtype)
    ids_BT = document_ids(4, 1, 6).expand(2, -1) if packed else None
    cache, pieces, start = layer.new_cache(2, 20), [], 0
    for length in split:
        ids = None if ids_BT is None else ids_BT[:, start : start + length]
        pieces.append(layer(x_BTD[:, start : start + length], cache=cache, document_ids_BT=ids))
        start += length
    expected = compute_reference(dict(layer.named_parameters()), layer.spec, x_BTD, ids_BT)
    assert_close(torch.cat(pieces, dim=1), expected.out_BTD, dtype, "outputs")
    assert_close(cache.compressed_BSE[:, :11], expected.cached_BTE, dtype, "cache")


@pytest.mark.parametrize("form", ["naive", "absorbed"])
def test_gradient_of_a_call_on_a_cache(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the new tokens, behind others that are not differentiated."""
    choose_form(monkeypatch, form)
    layer, x_BTD = build(torch.float64), random_activations(2, 9, 24)
    new_BTD = x_BTD[:, 5:].clone().requires_grad_()
    cache = layer.new_cache(2, 9)
    with torch.no_grad():
        layer(x_BTD[:, :5], cache=cache)
    (grad,) = torch.autograd.grad(layer(new_BTD, cache=cache).square().sum(), new_BTD)
    all_BTD = torch.cat([x_BTD[:, :5], new_BTD], dim=1)
    expected_BTD = compute_reference(dict(layer.named_parameters()), layer.spec, all_BTD).out_BTD[:, 5:]
    (expected,) = torch.autograd.grad(expected_BTD.square().sum(), new_BTD)
    assert_close(grad, expected, torch.float64, "gradient of the new tokens")


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("form", ["naive", "absorbed"])
def test_flex_attention_sees_the_same(form: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without masks, in both forms, behind a cache."""
    choose_form(monkeypatch, form)
    layer, x_BTD = build(torch.float64), random_activations(2, 9, 24)
    ids_BT = document_ids(3, 6).expand(2, -1) if packed else None
    cache, pieces = layer.new_cache(2, 9), []
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        ids = None if ids_BT is None else ids_BT[:, start:stop]
        context = build_context(x_BTD[:, start:stop], document_ids_BT=ids, history=cache.history, kernel="flex")
        pieces.append(layer(x_BTD[:, start:stop], layer.prepare(context), cache=cache))
    expected = compute_reference(dict(layer.named_parameters()), layer.spec, x_BTD, ids_BT)
    assert_close(torch.cat(pieces, dim=1), expected.out_BTD, torch.float64, "outputs")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_step_of_static_shapes_equals_reference(dtype: torch.dtype) -> None:
    """Rows that are at different places, in one call whose shapes say nothing of where."""
    layer, x_BTD, n_past = build(dtype), random_activations(3, 9, 24, dtype=dtype), [8, 2, 0]
    cache = layer.new_cache(3, 9)
    cache.clear()
    mask_B11S = torch.full((3, 1, 1, 9), -torch.inf, dtype=dtype)
    for row, length in enumerate(n_past):
        if length:
            layer(x_BTD[row : row + 1, :length], cache=cache.row(row))
        mask_B11S[row, ..., : length + 1] = 0
    n_past_B = torch.tensor(n_past)
    context = AttentionContext(n_past_B, n_past_B[:, None], kernel=DECODE_KERNEL, mask_B1TS=mask_B11S)
    new_BTD = x_BTD[torch.arange(3), n_past_B][:, None]
    out_BTD = layer(new_BTD, layer.prepare(context), cache=cache)
    for row, length in enumerate(n_past):
        expected = compute_reference(dict(layer.named_parameters()), layer.spec, x_BTD[row : row + 1, : length + 1])
        assert_close(out_BTD[row], expected.out_BTD[0, -1:], dtype, f"output of row {row}")
        assert_close(cache.compressed_BSE[row, : length + 1], expected.cached_BTE[0], dtype, f"cache of row {row}")
        assert (cache.compressed_BSE[row, length + 1 :] == 0).all()


def test_what_a_form_costs_decides() -> None:
    """DeepSeek-V2-Lite: expansion weights 512 * 256 a head against 1088 - 320 a pair of query and key."""
    spec = build(torch.float64, kv_latent_width=512, nope_width=128, rotary_width=64, value_width=128).spec
    assert is_absorbed(spec, 1, torch.tensor([0]))
    assert not is_absorbed(spec, 1, 0)
    assert not is_absorbed(spec, 4096, 0)
    assert all(is_absorbed(spec, 1, n_past) for n_past in (6, 100, 10**6))
    assert [is_absorbed(spec, n_tokens, 10**7) for n_tokens in (170, 171)] == [True, False]
    # Small latents would always be absorbed: scores of all pairs at once are too much for a long chunk.
    small = build(torch.float64, kv_latent_width=2).spec
    assert [is_absorbed(small, n_tokens, 10) for n_tokens in (256, 257)] == [True, False]


def test_a_history_may_be_shared() -> None:
    layer, history = build(torch.float64), TokenHistory(2, 5)
    assert layer.new_cache(2, 5, history=history).history is history

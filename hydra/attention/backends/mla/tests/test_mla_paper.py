"""Claims of arXiv 2405.04434 as assertions; numbers are those of spec/architectures.md 3.

1, 3 and 4 (causality, prefill == decode, cache bytes) also stand in the contract suite.
"""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hydra.attention import build_attention
from hydra.attention.backends.gqa.attention import GroupedQueryAttention
from hydra.attention.backends.mla import attention
from hydra.attention.backends.mla.attention import LatentAttention
from hydra.attention.core import softmax_attention
from hydra.attention.masks import AttentionContext, build_context
from hydra.testing.specs import build_random_layer, random_activations
from hydra.testing.tolerances import assert_close

WIDTHS = {"kv_latent_width": 12, "q_latent_width": 0, "nope_width": 5, "rotary_width": 6, "value_width": 7}


def build(**changes: int) -> LatentAttention:
    layer = build_random_layer("mla", 32, 4, torch.float64, **{**WIDTHS, **changes})
    assert isinstance(layer, LatentAttention)
    return layer


def choose_form(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(attention, "is_absorbed", lambda spec, n_tokens, n_past: form == "absorbed")


def context_of(layer: LatentAttention, x_BTD: Tensor, shift: int = 0) -> AttentionContext:
    return layer.prepare(build_context(x_BTD, torch.arange(x_BTD.shape[1])[None] + shift))


@pytest.mark.parametrize("form", ["naive", "absorbed"])
def test_01_changing_a_token_changes_no_earlier_output(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_form(monkeypatch, form)
    layer, x_BTD = build(), random_activations(2, 9, 32)
    changed_BTD = x_BTD.clone()
    changed_BTD[:, 4] = -changed_BTD[:, 4]
    is_same_T = (layer(x_BTD) == layer(changed_BTD)).all(-1).all(0)
    assert is_same_T.tolist() == [True] * 4 + [False] * 5


@pytest.mark.parametrize("q_latent_width", [0, 9])
@pytest.mark.parametrize("n_tokens", [1, 2, 33])
def test_02_naive_equals_absorbed(n_tokens: int, q_latent_width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x_BTD = build(q_latent_width=q_latent_width), random_activations(2, n_tokens, 32)
    outputs = []
    for form in ("naive", "absorbed"):
        choose_form(monkeypatch, form)
        outputs.append(layer(x_BTD))
    assert_close(*outputs, torch.float64, "outputs")


@torch.no_grad()
@pytest.mark.parametrize("form", ["naive", "absorbed", "chosen"])
@pytest.mark.parametrize("n_decoded", [1, 2, 3, 5])
def test_03_prefill_equals_decode(n_decoded: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x_BTD = build(), random_activations(2, 11, 32)
    expected_BTD = layer(x_BTD)
    if form != "chosen":
        choose_form(monkeypatch, form)
    cache = layer.new_cache(2, 11)
    pieces = [layer(x_BTD[:, :6], cache=cache)]
    for start in range(6, 11, n_decoded):
        pieces.append(layer(x_BTD[:, start : start + n_decoded], cache=cache))
    assert_close(torch.cat(pieces, dim=1), expected_BTD, torch.float64, "outputs")


@pytest.mark.parametrize("n_heads", [1, 4, 16])
def test_04_cache_is_latent_and_one_rotary_key_whatever_the_heads(n_heads: int) -> None:
    layer = build_random_layer("mla", 32, n_heads, torch.float64, **WIDTHS)
    cache = layer.new_cache(3, 10)
    layer(random_activations(3, 10, 32), cache=cache)
    tensors = [value for value in vars(cache).values() if isinstance(value, Tensor)]
    assert sum(value.untyped_storage().nbytes() for value in tensors) == 3 * 10 * (12 + 6) * 8
    assert layer.kv_bytes_per_token == (12 + 6) * 8


def test_04_deepseek_v2_caches_576_elements_a_token() -> None:
    with torch.device("meta"):
        layer = build_attention("mla", d_model=2048, n_heads=16).to(torch.bfloat16)
    assert layer.kv_bytes_per_token == 1152


@pytest.mark.parametrize(("q_latent_width", "millions"), [(0, 13.763), (1536, 15.335)])
def test_05_parameters(q_latent_width: int, millions: float) -> None:
    """spec/architectures.md 0.1 and 0.2, DeepSeek-V2-Lite's shape, which the defaults have; the norms count apart."""
    with torch.device("meta"):
        layer = build_attention("mla", d_model=2048, n_heads=16, q_latent_width=q_latent_width)
    n_matrices = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim == 2)
    n_vectors = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim == 1)
    assert n_matrices / 1e6 == pytest.approx(millions, abs=6e-4)
    assert n_vectors == 512 + q_latent_width


def test_06_rotary_key_is_the_same_for_all_heads() -> None:
    layer, x_BTD = build(), random_activations(2, 7, 32)
    compressed_BTE = layer.compress(x_BTD, context_of(layer, x_BTD))
    k_BNSX, _ = layer.expand(compressed_BTE)
    assert torch.equal(k_BNSX[..., 5:], compressed_BTE[:, None, :, 12:].expand(-1, 4, -1, -1))
    assert (k_BNSX[:, 0, :, :5] != k_BNSX[:, 1, :, :5]).all()


def test_06_positions_turn_the_rotary_part_only_and_scores_depend_on_differences() -> None:
    layer, x_BTD = build(), random_activations(2, 7, 32)

    def parts(shift: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        context = context_of(layer, x_BTD, shift)
        q_BTNC, q_BTNR = layer.compute_queries(x_BTD, context)
        k_BSNX = layer.expand(layer.compress(x_BTD, context))[0].transpose(1, 2)
        return q_BTNC, q_BTNR, *k_BSNX.split([5, 6], dim=-1)

    q_nope, q_rotary, k_nope, k_rotary = parts(0)
    moved_q_nope, moved_q_rotary, moved_k_nope, moved_k_rotary = parts(1234)
    assert torch.equal(moved_q_nope, q_nope)
    assert torch.equal(moved_k_nope, k_nope)
    assert ((moved_q_rotary - q_rotary).abs().amax(-1) > 1e-3).all()
    assert ((moved_k_rotary - k_rotary).abs().amax(-1) > 1e-3).all()
    scores = torch.einsum("btnr,bsnr->bnts", q_rotary, k_rotary)
    assert_close(torch.einsum("btnr,bsnr->bnts", moved_q_rotary, moved_k_rotary), scores, torch.float64, "scores")


def test_06_channels_are_rotated_by_halves() -> None:
    """Channel r with r + R/2 as in the released checkpoints of Hugging Face; position 0 turns nothing."""
    layer, x_BTD = build(), random_activations(1, 3, 32)
    plain_BTR = layer.kv_down_proj(x_BTD)[..., 12:]
    turned_BTR = layer.compress(x_BTD, context_of(layer, x_BTD))[..., 12:]
    assert torch.equal(turned_BTR[:, 0], plain_BTR[:, 0])
    norms, turned_norms = (x.unflatten(-1, (2, 3)).square().sum(2) for x in (plain_BTR, turned_BTR))
    assert_close(turned_norms, norms, torch.float64, "norms of the planes (r, r + R/2)")


@torch.no_grad()
def test_07_cached_latent_is_normalised() -> None:
    layer, x_BTD = build(), 10 * random_activations(2, 9, 32)
    cache = layer.new_cache(2, 9)
    layer(x_BTD[:, :8], cache=cache)
    layer(x_BTD[:, 8:], cache=cache)
    unit_BSL = cache.compressed_BSE[..., :12] / layer.kv_norm.weight
    torch.testing.assert_close(unit_BSL.square().mean(-1), torch.ones(2, 9, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", ["naive", "absorbed"])
def test_08_scale_counts_rotated_channels(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_form(monkeypatch, form)
    layer, x_BTD = build(), random_activations(2, 7, 32)
    context = context_of(layer, x_BTD)
    q_BNTX = torch.cat(layer.compute_queries(x_BTD, context), dim=-1).transpose(1, 2)
    k_BNSX, v_BNSU = layer.expand(layer.compress(x_BTD, context))
    is_future_TS = torch.ones(7, 7, dtype=torch.bool).triu(1)
    scores_BNTS = (q_BNTX @ k_BNSX.transpose(2, 3)).masked_fill(is_future_TS, -torch.inf)
    outputs = [
        layer.o_proj(((scores_BNTS * width**-0.5).softmax(-1) @ v_BNSU).transpose(1, 2).flatten(2))
        for width in (5 + 6, 5)
    ]
    assert_close(layer(x_BTD), outputs[0], torch.float64, "outputs")
    assert (layer(x_BTD) - outputs[1]).abs().max() > 1e-3


def test_09_without_a_query_latent_there_is_no_query_norm() -> None:
    x_BTD = random_activations(2, 5, 32)
    plain, latent = build(), build(q_latent_width=9)
    assert sorted(name for name, _ in plain.named_parameters() if name.startswith("q")) == ["q_proj.weight"]
    assert sorted(name for name, _ in latent.named_parameters() if name.startswith("q")) == [
        "q_down_proj.weight",
        "q_norm.weight",
        "q_up_proj.weight",
    ]

    def queries(layer: LatentAttention, factor: float) -> Tensor:
        return torch.cat(layer.compute_queries(x_BTD * factor, context_of(layer, x_BTD)), dim=-1)

    assert_close(queries(plain, 2.0), 2 * queries(plain, 1.0), torch.float64, "queries without a norm are linear")
    torch.testing.assert_close(queries(latent, 2000.0), queries(latent, 1000.0), atol=1e-6, rtol=1e-6)


def test_10_without_rotation_and_with_full_rank_it_is_multi_head_attention() -> None:
    """The latent is the input: as wide, through the unit matrix, with a norm that leaves unit rows as they are."""
    layer = build(kv_latent_width=32, nope_width=8, rotary_width=0, value_width=8)
    multi_head = build_random_layer("gqa", 32, 4, torch.float64, n_kv_heads=4)
    assert isinstance(multi_head, GroupedQueryAttention)
    with torch.no_grad():
        layer.kv_down_proj.weight.copy_(torch.eye(32))
        layer.kv_norm.weight.fill_((1 + attention.NORM_EPS) ** 0.5)
        keys_NHD, values_NHD = (p.weight.unflatten(0, (4, 8)) for p in (multi_head.k_proj, multi_head.v_proj))
        layer.kv_up_proj.weight.copy_(torch.cat([keys_NHD, values_NHD], dim=1).flatten(0, 1))
        layer.q_proj.weight.copy_(multi_head.q_proj.weight)
        layer.o_proj.weight.copy_(multi_head.o_proj.weight)
    x_BTD = random_activations(2, 9, 32)
    x_BTD = x_BTD / x_BTD.square().mean(-1, keepdim=True).sqrt()
    unrotated = torch.zeros(1, 9, dtype=torch.int64)
    assert_close(layer(x_BTD), multi_head(x_BTD, positions_BT=unrotated), torch.float64, "outputs")


@pytest.mark.parametrize("through", ["keys", "values"])
def test_11_gradient_reaches_the_latent_through_keys_and_values(through: str) -> None:
    layer, x_BTD = build(), random_activations(2, 7, 32)
    context = context_of(layer, x_BTD)
    compressed_BTE = layer.compress(x_BTD, context).detach().requires_grad_()
    q_BNTX = torch.cat(layer.compute_queries(x_BTD, context), dim=-1).transpose(1, 2)
    k_BNSX, v_BNSU = layer.expand(compressed_BTE)
    k_BNSX, v_BNSU = (k_BNSX, v_BNSU.detach()) if through == "keys" else (k_BNSX.detach(), v_BNSU)
    out_BNTU = softmax_attention(q_BNTX, k_BNSX, v_BNSU, context)
    (grad_BTE,) = torch.autograd.grad(out_BNTU.square().sum(), compressed_BTE)
    assert (grad_BTE[..., :12].abs().amax(-1) > 1e-6).all()
    reaches_rotary_key = bool((grad_BTE[..., 12:].abs().amax(-1) > 1e-6).all())
    assert reaches_rotary_key == (through == "keys")


@pytest.mark.parametrize(("n_tokens", "gigaflops"), [(4096, 198.7), (16384, 1825.4)])
def test_12_naive_operations(n_tokens: int, gigaflops: float) -> None:
    """spec/architectures.md 0.1, DeepSeek-V2-Lite's shape, causal pairs; counted operations: contract suite."""
    with torch.device("meta"):
        layer = build_attention("mla", d_model=2048, n_heads=16)
    assert layer.flops(n_tokens) / 1e9 == pytest.approx(gigaflops, abs=0.06)


@torch.no_grad()
@pytest.mark.parametrize("n_past", [9, 30])
def test_12_absorbed_operations_of_a_decoded_token(n_past: int) -> None:
    """spec/architectures.md 0.2: two products with the expansion's weights a token, and nothing else for each head."""
    layer, x_BTD = build(), random_activations(1, n_past + 1, 32)
    cache = layer.new_cache(1, n_past + 1)
    layer(x_BTD[:, :n_past], cache=cache)
    with FlopCounterMode(display=False) as counter:
        layer(x_BTD[:, n_past:], cache=cache)
    n_others = 32 * 4 * (5 + 6) + 32 * (12 + 6) + 4 * 7 * 32
    absorption = 2 * 4 * 5 * 12 + 2 * 4 * 7 * 12
    assert counter.get_total_flops() == 2 * n_others + absorption + 2 * 4 * (2 * 12 + 6) * (n_past + 1)

"""Claims of arXiv 2510.04476 as assertions; numbers are those of spec/architectures.md 1.6.

1, 2, 3, 4, 11 and 13 also stand, for more shapes, in the contract suite.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hydra.attention import build_attention
from hydra.attention.backends.ccgqa.attention import CompressedConvolutionalAttention
from hydra.attention.masks import build_context
from hydra.kernels.cca_convolution import convolve_causally
from hydra.layers.rotary import apply_rotary, compute_rotary
from hydra.model.framework import build_model
from hydra.testing.specs import build_random_layer, document_ids, random_activations, tiny_model_spec
from hydra.testing.tolerances import assert_close


def build(dtype: torch.dtype = torch.float64, **options: Any) -> CompressedConvolutionalAttention:
    """Width 32, 8 reference heads of width 4; 4 query and 2 key heads unless told."""
    layer = build_random_layer("ccgqa", 32, 8, dtype, **{"n_query_heads": 4, "n_kv_heads": 2, **options})
    assert isinstance(layer, CompressedConvolutionalAttention)
    return layer


def queries_and_keys(layer: CompressedConvolutionalAttention, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys before the rotary embedding, (B, T, heads, H)."""
    q_BTNH, k_BTKH = layer.mix_queries_keys(x_BTD, build_context(x_BTD), None)
    no_rotation = compute_rotary(torch.zeros(1, x_BTD.shape[1], dtype=torch.int64), 2, 10_000.0, x_BTD.dtype)
    dtype = torch.promote_types(q_BTNH.dtype, torch.float32)
    return (
        layer.normalise(q_BTNH, no_rotation, None, dtype),
        layer.normalise(k_BTKH, no_rotation, layer.temp, dtype),
    )


def values(layer: CompressedConvolutionalAttention, x_BTD: Tensor) -> Tensor:
    return layer.compute_values(x_BTD, build_context(x_BTD), None)


@pytest.mark.parametrize("t", [0, 3, 8])
def test_1_causality_to_the_bit(t: int) -> None:
    layer, x_BTD = build(torch.float32), random_activations(2, 9, 32, dtype=torch.float32)
    changed_BTD = x_BTD.clone()
    changed_BTD[:, t] += 0.5
    out_BTD, changed_out_BTD = layer(x_BTD), layer(changed_BTD)
    assert torch.equal(out_BTD[:, :t], changed_out_BTD[:, :t])
    assert not torch.equal(out_BTD[:, t], changed_out_BTD[:, t])


@pytest.mark.parametrize(("k0", "k1"), [(2, 2), (3, 2), (1, 3), (4, 4)])
@torch.no_grad()
def test_2_prefill_then_decode_equals_one_pass(k0: int, k1: int) -> None:
    layer, x_BTD = build(conv_kernel_0=k0, conv_kernel_1=k1), random_activations(2, 12, 32)
    expected_BTD = layer(x_BTD)
    for n_prefilled in {0, 1, k0 + k1 - 3, k0 + k1 - 2, 7}:
        for chunk in (1, 3):
            cache = layer.new_cache(2, 12)
            pieces = [layer(x_BTD[:, :n_prefilled], cache=cache)] if n_prefilled else []
            for start in range(n_prefilled, 12, chunk):
                pieces.append(layer(x_BTD[:, start : start + chunk], cache=cache))
            assert_close(torch.cat(pieces, dim=1), expected_BTD, torch.float64, f"{n_prefilled} then {chunk}")


def test_3_cache_size_does_not_depend_on_query_heads() -> None:
    few, many = build(n_query_heads=2), build(n_query_heads=8)
    assert few.kv_bytes_per_token == many.kv_bytes_per_token == 2 * 2 * 4 * 8
    assert build(conv_kernel_0=3).constant_state_bytes == (6 * 4 * 3 + 2 * 4 // 2) * 8


def test_4_shapes_and_groups_of_the_convolutions() -> None:
    layer = build(conv_kernel_0=3)
    assert layer.conv0.weight.shape == (24, 1, 3)
    assert layer.conv0.groups == 24
    assert layer.conv1.weight.shape == (24, 4, 2)
    assert layer.conv1.groups == 6
    assert layer.temp.shape == (2,)


@pytest.mark.parametrize(
    ("n_query_heads", "n_kv_heads", "millions", "gigaflops_4096"),
    [(4, 4, 4.461, 53.7), (2, 2, 2.230, 26.9), (8, 2, 5.576, 80.0), (16, 4, 11.151, 160.0)],
)
def test_4_table_of_costs(n_query_heads: int, n_kv_heads: int, millions: float, gigaflops_4096: float) -> None:
    """spec/architectures.md 0.1: d_model 2048, 16 reference heads, causal pairs; published as CCA-4x, CCA-8x, ..."""
    with torch.device("meta"):
        layer = build_attention("ccgqa", d_model=2048, n_heads=16, n_query_heads=n_query_heads, n_kv_heads=n_kv_heads)
    assert sum(parameter.numel() for parameter in layer.parameters()) / 1e6 == pytest.approx(millions, abs=6e-4)
    assert layer.flops(4096) / 1e9 == pytest.approx(gigaflops_4096, abs=0.06)
    assert layer.kv_bytes_per_token == 2 * n_kv_heads * 128 * 4


@pytest.mark.parametrize("rotary_fraction", [0.5, 1.0])
def test_5_norms_and_largest_score(rotary_fraction: float) -> None:
    layer = build(rotary_fraction=rotary_fraction)
    q_BTNH, k_BTKH = queries_and_keys(layer, random_activations(2, 9, 32))
    rotary = compute_rotary(torch.arange(9)[None], layer.spec.rotary_width, layer.spec.rope_base, torch.float64)
    beta_K = layer.temp.detach().exp()
    for q, k in ((q_BTNH, k_BTKH), (apply_rotary(q_BTNH, *rotary), apply_rotary(k_BTKH, *rotary))):
        assert_close(q.norm(dim=-1), torch.full((2, 9, 4), 2.0), torch.float64, "norms of queries")
        assert_close(k.norm(dim=-1), (2.0 * beta_K).expand(2, 9, 2), torch.float64, "norms of keys")
        scores_BNTS = torch.einsum("btnh,bsnh->bnts", q, k.repeat_interleave(2, dim=2)) / 2.0
        limit_N = 2.0 * beta_K.repeat_interleave(2)
        assert (scores_BNTS.abs().amax(dim=(0, 2, 3)) <= limit_N * (1 + 1e-12)).all()


@pytest.mark.parametrize(("n_query_heads", "n_kv_heads"), [(4, 2), (4, 1)])
def test_6_half_of_the_value_channels_come_from_the_previous_token(n_query_heads: int, n_kv_heads: int) -> None:
    layer, x_BTD = build(n_query_heads=n_query_heads, n_kv_heads=n_kv_heads), random_activations(2, 9, 32)
    half = n_kv_heads * 4 // 2
    v_BTC = values(layer, x_BTD).flatten(2)
    changed_BTD = x_BTD.clone()
    changed_BTD[:, 5] += 1.0
    is_changed_TC = (values(layer, changed_BTD).flatten(2) != v_BTC).any(0)
    assert is_changed_TC[5, :half].all()
    assert is_changed_TC[6, half:].all()
    assert is_changed_TC.sum() == 2 * half
    assert (v_BTC[:, 0, half:] == 0).all()


def test_7_convolutions_do_not_mix_heads() -> None:
    layer, u_BPC = build(), random_activations(1, 9, 24)
    weights = layer.conv0.weight, layer.conv0.bias, layer.conv1.weight, layer.conv1.bias
    out_BTMH = convolve_causally(u_BPC, *weights, None)
    for head in range(6):
        changed_BPC = u_BPC.clone()
        changed_BPC[:, :, head * 4] += 1.0
        is_changed_M = (convolve_causally(changed_BPC, *weights, None) != out_BTMH).any(3).any(1)[0]
        assert is_changed_M.tolist() == [m == head for m in range(6)]


def zero_convolutions(layer: CompressedConvolutionalAttention) -> CompressedConvolutionalAttention:
    with torch.no_grad():
        for parameter in (*layer.conv0.parameters(), *layer.conv1.parameters()):
            parameter.zero_()
    return layer


@torch.no_grad()
def test_8_without_convolutions_queries_point_along_the_mean() -> None:
    layer, x_BTD = zero_convolutions(build()), random_activations(2, 9, 32)
    q_BTNH, k_BTKH = queries_and_keys(layer, x_BTD)
    raw_q = layer.q_proj(x_BTD).view(2, 9, 4, 4)
    raw_k = layer.k_proj(x_BTD).view(2, 9, 2, 4)
    mean_q = 0.5 * (raw_q + raw_k.repeat_interleave(2, dim=2))
    mean_k = torch.stack([mean_q[:, :, :2].mean(2), mean_q[:, :, 2:].mean(2)], dim=2)
    assert_close(F.normalize(q_BTNH, dim=-1), F.normalize(mean_q, dim=-1), torch.float64, "queries")
    assert_close(F.normalize(k_BTKH, dim=-1), F.normalize(mean_k, dim=-1), torch.float64, "keys")


@torch.no_grad()
def test_8_without_convolutions_or_groups_queries_and_keys_are_parallel() -> None:
    layer = zero_convolutions(build(n_query_heads=2))
    q_BTNH, k_BTKH = queries_and_keys(layer, random_activations(2, 9, 32))
    assert_close(F.normalize(q_BTNH, dim=-1), F.normalize(k_BTKH, dim=-1), torch.float64, "directions")


def test_9_equal_head_counts_are_cca() -> None:
    """A group of one: k gets the mean that its own query gets, and key head j is read by query head j."""
    layer, x_BTD = build(n_query_heads=2, n_kv_heads=2), random_activations(2, 9, 32)
    spec = layer.spec
    # CCA of Listing 1 without any grouping, from torch's own parts.
    q_BTC, k_BTC = layer.q_proj(x_BTD), layer.k_proj(x_BTD)
    padded_BCP = F.pad(torch.cat([q_BTC, k_BTC], dim=-1).transpose(1, 2), (2, 0))
    conv_q, conv_k = layer.conv1(layer.conv0(padded_BCP)).transpose(1, 2).chunk(2, dim=-1)
    mean = 0.5 * (q_BTC + k_BTC)
    q = 2.0 * F.normalize((conv_q + mean).view(2, 9, 2, 4), dim=-1)
    k = 2.0 * F.normalize((conv_k + mean).view(2, 9, 2, 4), dim=-1) * layer.temp.exp()[:, None]
    v = torch.cat([layer.v_proj(x_BTD), layer.v_previous_proj(F.pad(x_BTD, (0, 0, 1, -1)))], dim=-1).view(2, 9, 2, 4)
    rotary = compute_rotary(torch.arange(9)[None], spec.rotary_width, spec.rope_base, torch.float64)
    q, k, v = (a.transpose(1, 2) for a in (apply_rotary(q, *rotary), apply_rotary(k, *rotary), v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    assert_close(layer(x_BTD), layer.o_proj(out), torch.float64, "outputs")


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e3])
@torch.no_grad()
def test_10_queries_and_keys_do_not_depend_on_the_scale_of_the_input(factor: float) -> None:
    layer, x_BTD = build(), random_activations(2, 9, 32)
    layer.conv0.bias.zero_()
    layer.conv1.bias.zero_()
    for ours, expected in zip(queries_and_keys(layer, x_BTD * factor), queries_and_keys(layer, x_BTD), strict=True):
        assert_close(ours, expected, torch.float64, "queries and keys")


def test_11_counted_operations() -> None:
    """2 (lin + conv) S + 4 lq S^2, all pairs counted; the depthwise convolution is element-wise: not in the count."""
    layer, n_tokens = build(torch.float32), 17
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        layer(random_activations(1, n_tokens, 32, dtype=torch.float32))
    linear, depthwise, per_head = 2 * 32 * 24, 24 * 2, 6 * 4 * 4 * 2
    assert counter.get_total_flops() == 2 * (linear + per_head) * n_tokens + 4 * 16 * n_tokens**2
    n_pairs = n_tokens * (n_tokens + 1) // 2
    assert layer.flops(n_tokens) == 2 * (linear + depthwise + per_head) * n_tokens + 4 * 16 * n_pairs


def test_12_left_padding_as_a_document_of_its_own_equals_an_unpadded_run() -> None:
    layer, x_BTD = build(), random_activations(1, 6, 32)
    padded_BTD = torch.cat([random_activations(1, 3, 32, seed=5), x_BTD], dim=1)
    out_BTD = layer(padded_BTD, document_ids_BT=document_ids(3, 6))
    assert_close(out_BTD[:, 3:], layer(x_BTD), torch.float64, "outputs")


def test_13_packed_documents_equal_separate_runs() -> None:
    layer, x_BTD = build(conv_kernel_0=3, conv_kernel_1=3), random_activations(1, 13, 32)
    out_BTD = layer(x_BTD, document_ids_BT=document_ids(1, 2, 6, 4))
    alone = torch.cat([layer(part) for part in x_BTD.split([1, 2, 6, 4], dim=1)], dim=1)
    assert_close(out_BTD, alone, torch.float64, "outputs")


def test_14_temperature_starts_at_one_and_everything_learns() -> None:
    model = build_model(tiny_model_spec(attention="ccgqa", n_heads=8))
    attention = model.blocks[0].attention
    assert isinstance(attention, CompressedConvolutionalAttention)
    assert (attention.temp == 0).all()
    tokens_BT = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    model(tokens_BT[:, :-1], tokens_BT[:, 1:]).losses["cross_entropy"].backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_15_bfloat16_comes_close_with_norms_in_float32() -> None:
    layer, x_BTD = build(torch.bfloat16), random_activations(2, 33, 32, dtype=torch.bfloat16)
    exact = build(torch.float32)
    exact.load_state_dict(layer.state_dict())
    assert_close(layer(x_BTD), exact(x_BTD.float()), torch.bfloat16, "outputs")
    q_BTNH, k_BTKH = queries_and_keys(layer, x_BTD)
    assert q_BTNH.dtype == k_BTKH.dtype == torch.float32
    assert_close(q_BTNH.norm(dim=-1), torch.full((2, 33, 4), 2.0), torch.float32, "norms of queries")


@pytest.mark.parametrize(("n_query_heads", "n_kv_heads"), [(8, 8), (4, 2), (2, 1)])
def test_16_head_width_is_that_of_the_reference_whatever_the_compression(n_query_heads: int, n_kv_heads: int) -> None:
    layer = build(n_query_heads=n_query_heads, n_kv_heads=n_kv_heads)
    assert layer.q_proj.weight.shape == (n_query_heads * 4, 32)
    assert layer.k_proj.weight.shape == (n_kv_heads * 4, 32)
    assert layer.new_cache(1, 5).k_BKSH.shape == (1, n_kv_heads, 5, 4)

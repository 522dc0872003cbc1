"""Claims of arXiv 2305.13245 and of multi-head attention as assertions; numbers are those of spec/architectures.md 2.

1, 2, 5 and 6 (causality, prefill == decode, cache bytes, parameters and operations) also stand in the contract suite.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hydra.attention import build_attention
from hydra.attention.backends.gqa.attention import GroupedQueryAttention
from hydra.attention.core import softmax_attention
from hydra.attention.masks import AttentionContext
from hydra.layers.rotary import apply_rotary, compute_rotary
from hydra.testing.specs import build_random_layer, document_ids, random_activations
from hydra.testing.tolerances import assert_close


def build(n_kv_heads: int, n_heads: int = 8) -> GroupedQueryAttention:
    layer = build_random_layer("gqa", 32, n_heads, n_kv_heads=n_kv_heads)
    assert isinstance(layer, GroupedQueryAttention)
    return layer


def with_repeated_heads(layer: GroupedQueryAttention) -> GroupedQueryAttention:
    """Multi-head attention whose key and value heads repeat those of `layer` within each group."""
    multi_head = build(layer.spec.n_heads, layer.spec.n_heads)
    state = layer.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        heads = state[name].view(layer.spec.n_kv_heads, layer.spec.head_width, -1)
        state[name] = heads.repeat_interleave(layer.spec.n_heads // layer.spec.n_kv_heads, dim=0).flatten(0, 1)
    multi_head.load_state_dict(state)
    return multi_head


def torch_multi_head(layer: GroupedQueryAttention, x_BTD: Tensor) -> Tensor:
    """torch's own multi-head attention with the weights of `layer`; it has no rotary embedding."""
    theirs = torch.nn.MultiheadAttention(32, layer.spec.n_heads, bias=False, batch_first=True, dtype=torch.float64)
    qkv = torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight])
    theirs.load_state_dict({"in_proj_weight": qkv, "out_proj.weight": layer.o_proj.weight})
    is_hidden_TT = torch.ones(x_BTD.shape[1], x_BTD.shape[1], dtype=torch.bool).triu(1)
    return theirs(x_BTD, x_BTD, x_BTD, attn_mask=is_hidden_TT, need_weights=False)[0]


def test_1_changing_a_token_changes_no_earlier_output() -> None:
    layer, x_BTD = build(2), random_activations(2, 9, 32)
    changed_BTD = x_BTD.clone()
    changed_BTD[:, 4] = -changed_BTD[:, 4]
    is_same_T = (layer(x_BTD) == layer(changed_BTD)).all(-1).all(0)
    assert is_same_T.tolist() == [True] * 4 + [False] * 5


@torch.no_grad()
@pytest.mark.parametrize("n_decoded", [1, 2, 3, 5])
def test_2_decoding_several_tokens_at_once_equals_prefill(n_decoded: int) -> None:
    layer, x_BTD = build(2), random_activations(2, 11, 32)
    cache = layer.new_cache(2, 11)
    pieces = [layer(x_BTD[:, :6], cache=cache)]
    for start in range(6, 11, n_decoded):
        pieces.append(layer(x_BTD[:, start : start + n_decoded], cache=cache))
    assert_close(torch.cat(pieces, dim=1), layer(x_BTD), torch.float64, "outputs")


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_3_repeating_key_and_value_heads_gives_multi_head_attention(n_kv_heads: int) -> None:
    layer, x_BTD = build(n_kv_heads), random_activations(2, 9, 32)
    assert_close(with_repeated_heads(layer)(x_BTD), layer(x_BTD), torch.float64, "outputs")


def test_4_as_many_key_heads_as_heads_is_multi_head_attention() -> None:
    layer, x_BTD = build(8), random_activations(2, 9, 32)
    # All positions 0: no rotation, as in torch's module.
    out_BTD = layer(x_BTD, positions_BT=torch.zeros(1, 9, dtype=torch.int64))
    assert_close(out_BTD, torch_multi_head(layer, x_BTD), torch.float64, "outputs")


def test_4_one_key_head_is_multi_query_attention() -> None:
    layer, x_BTD = build(1), random_activations(2, 9, 32)
    assert layer.k_proj.weight.shape == layer.v_proj.weight.shape == (4, 32)
    out_BTD = layer(x_BTD, positions_BT=torch.zeros(1, 9, dtype=torch.int64))
    assert_close(out_BTD, torch_multi_head(with_repeated_heads(layer), x_BTD), torch.float64, "outputs")


def test_5_cache_is_two_key_head_widths_a_token() -> None:
    layer = build(2)
    cache = layer.new_cache(3, 10)
    assert cache.k_BKSH.nbytes + cache.v_BKSH.nbytes == 3 * 10 * 2 * 2 * 4 * 8
    assert build(2, n_heads=4).kv_bytes_per_token == 2 * layer.kv_bytes_per_token


@pytest.mark.parametrize(
    ("n_kv_heads", "millions", "gigaflops_4096"),
    [(16, 16.777, 206.2), (8, 12.583, 171.8), (4, 10.486, 154.6), (1, 8.913, 141.8)],
)
def test_6_table_of_costs(n_kv_heads: int, millions: float, gigaflops_4096: float) -> None:
    """spec/architectures.md 0.1, d_model 2048 with 16 heads, causal pairs."""
    with torch.device("meta"):
        layer = build_attention("gqa", d_model=2048, n_heads=16, n_kv_heads=n_kv_heads)
    assert sum(parameter.numel() for parameter in layer.parameters()) / 1e6 == pytest.approx(millions, abs=6e-4)
    assert layer.flops(4096) / 1e9 == pytest.approx(gigaflops_4096, abs=0.06)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
def test_7_kernels_of_torch_agree_forward_and_backward(masked: bool) -> None:
    layer, x_BTD = build(2), random_activations(2, 9, 32).requires_grad_()
    ids_BT = document_ids(4, 5).expand(2, -1) if masked else None
    inputs = [x_BTD, *layer.parameters()]
    results = []
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(kernel):
            out_BTD = layer(x_BTD, document_ids_BT=ids_BT)
            results.append([out_BTD, *torch.autograd.grad(out_BTD.square().sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, torch.float64)


@pytest.mark.parametrize("n_queries", [1, 3, 8])
def test_8_attention_rows_sum_to_one_and_are_zero_above_the_diagonal(n_queries: int) -> None:
    q_BNTH, k_BKSH = random_activations(2, 4, n_queries, 8), random_activations(2, 2, 8, 8, seed=1)
    # Values that are the unit vectors make the output the attention matrix itself.
    context = AttentionContext(8 - n_queries, torch.arange(n_queries)[None])
    weight_BNTS = softmax_attention(q_BNTH, k_BKSH, torch.eye(8, dtype=torch.float64).expand(2, 2, 8, 8), context)
    assert_close(weight_BNTS.sum(-1), torch.ones(2, 4, n_queries), torch.float64, "sums of rows")
    is_future_TS = torch.ones(n_queries, 8, dtype=torch.bool).triu(8 - n_queries + 1)
    assert (weight_BNTS[..., is_future_TS] == 0).all()
    assert (weight_BNTS[..., ~is_future_TS] > 0).all()


def test_9_rotary_scores_depend_on_differences_of_positions_only() -> None:
    q_BTNH, k_BTKH = random_activations(1, 7, 2, 8), random_activations(1, 7, 2, 8, seed=1)

    def scores(shift: int) -> Tensor:
        rotary = compute_rotary(torch.arange(7)[None] + shift, 8, 10000.0, torch.float64)
        return torch.einsum("btnh,bsnh->bnts", apply_rotary(q_BTNH, *rotary), apply_rotary(k_BTKH, *rotary))

    assert_close(scores(12345), scores(0), torch.float64, "scores")
    assert not torch.allclose(scores(0), torch.einsum("btnh,bsnh->bnts", q_BTNH, k_BTKH))


def test_11_rows_that_see_nothing_are_zero_not_nan() -> None:
    q_BNTH = random_activations(2, 4, 5, 8).requires_grad_()
    mask_B1TS = torch.zeros(2, 1, 5, 5, dtype=torch.float64)
    mask_B1TS[0, 0, 3] = -torch.inf
    context = AttentionContext(0, torch.arange(5)[None], mask_B1TS=mask_B1TS)
    out_BNTH = softmax_attention(q_BNTH, q_BNTH[:, :2], q_BNTH[:, :2], context)
    out_BNTH.sum().backward()
    assert (out_BNTH[0, :, 3] == 0).all()
    assert out_BNTH.isfinite().all()
    assert q_BNTH.grad is not None
    assert q_BNTH.grad.isfinite().all()


def test_11_padding_as_a_document_of_its_own_changes_nothing() -> None:
    layer, x_BTD = build(2), random_activations(1, 6, 32)
    padded_BTD = F.pad(x_BTD, (0, 0, 3, 2))
    out_BTD = layer(padded_BTD, document_ids_BT=document_ids(3, 6, 2))
    assert_close(out_BTD[:, 3:9], layer(x_BTD), torch.float64, "outputs")
    assert out_BTD.isfinite().all()

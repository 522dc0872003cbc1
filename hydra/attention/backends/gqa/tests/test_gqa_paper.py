"""Claims of arXiv 2305.13245 and of multi-head attention as assertions; numbers are those of spec/architectures.md 2.

1, 2, 5 and 6 (causality, prefill == decode, cache bytes, parameters and operations) also stand in the contract suite.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hydra.attention import build_attention
from hydra.attention.backends.gqa.attention import GroupedQueryAttention
from hydra.attention.backends.gqa.conversion import convert_to_grouped, mean_pool_heads
from hydra.attention.core import KERNELS, softmax_attention
from hydra.attention.masks import AttentionContext, build_context
from hydra.errors import ConfigError
from hydra.layers.rotary import apply_rotary, compute_rotary
from hydra.testing.specs import build_random_layer, build_random_model, document_ids, random_activations
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


def test_01_changing_a_token_changes_no_earlier_output() -> None:
    layer, x_BTD = build(2), random_activations(2, 9, 32)
    changed_BTD = x_BTD.clone()
    changed_BTD[:, 4] = -changed_BTD[:, 4]
    is_same_T = (layer(x_BTD) == layer(changed_BTD)).all(-1).all(0)
    assert is_same_T.tolist() == [True] * 4 + [False] * 5


@torch.no_grad()
@pytest.mark.parametrize("n_decoded", [1, 2, 3, 5])
def test_02_decoding_several_tokens_at_once_equals_prefill(n_decoded: int) -> None:
    layer, x_BTD = build(2), random_activations(2, 11, 32)
    cache = layer.new_cache(2, 11)
    pieces = [layer(x_BTD[:, :6], cache=cache)]
    for start in range(6, 11, n_decoded):
        pieces.append(layer(x_BTD[:, start : start + n_decoded], cache=cache))
    assert_close(torch.cat(pieces, dim=1), layer(x_BTD), torch.float64, "outputs")


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_03_repeating_key_and_value_heads_gives_multi_head_attention(n_kv_heads: int) -> None:
    layer, x_BTD = build(n_kv_heads), random_activations(2, 9, 32)
    assert_close(with_repeated_heads(layer)(x_BTD), layer(x_BTD), torch.float64, "outputs")


def test_04_as_many_key_heads_as_heads_is_multi_head_attention() -> None:
    layer, x_BTD = build(8), random_activations(2, 9, 32)
    # All positions 0: no rotation, as in torch's module.
    out_BTD = layer(x_BTD, positions_BT=torch.zeros(1, 9, dtype=torch.int64))
    assert_close(out_BTD, torch_multi_head(layer, x_BTD), torch.float64, "outputs")


def test_04_one_key_head_is_multi_query_attention() -> None:
    layer, x_BTD = build(1), random_activations(2, 9, 32)
    assert layer.k_proj.weight.shape == layer.v_proj.weight.shape == (4, 32)
    out_BTD = layer(x_BTD, positions_BT=torch.zeros(1, 9, dtype=torch.int64))
    assert_close(out_BTD, torch_multi_head(with_repeated_heads(layer), x_BTD), torch.float64, "outputs")


def test_05_cache_is_two_key_head_widths_a_token() -> None:
    layer = build(2)
    cache = layer.new_cache(3, 10)
    assert cache.k_BKSH.nbytes + cache.v_BKSH.nbytes == 3 * 10 * 2 * 2 * 4 * 8
    assert build(2, n_heads=4).kv_bytes_per_token == 2 * layer.kv_bytes_per_token


@pytest.mark.parametrize(
    ("n_kv_heads", "millions", "gigaflops_4096"),
    [(16, 16.777, 206.2), (8, 12.583, 171.8), (4, 10.486, 154.6), (1, 8.913, 141.8)],
)
def test_06_table_of_costs(n_kv_heads: int, millions: float, gigaflops_4096: float) -> None:
    """spec/architectures.md 0.1, d_model 2048 with 16 heads, causal pairs."""
    with torch.device("meta"):
        layer = build_attention("gqa", d_model=2048, n_heads=16, n_kv_heads=n_kv_heads)
    assert sum(parameter.numel() for parameter in layer.parameters()) / 1e6 == pytest.approx(millions, abs=6e-4)
    assert layer.flops(4096) / 1e9 == pytest.approx(gigaflops_4096, abs=0.06)


def layer_output(layer: GroupedQueryAttention, x_BTD: Tensor, ids_BT: Tensor | None, kernel: str) -> Tensor:
    return layer(x_BTD, layer.prepare(build_context(x_BTD, document_ids_BT=ids_BT, kernel=kernel)))


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel != "flash"] + ["flash_on_cpu"])
def test_07_kernels_agree_forward_and_backward(kernel: str, masked: bool, n_kv_heads: int, window: int) -> None:
    """With torch's plain mathematics. FlexAttention has no backward pass on a CPU; flash_on_cpu is torch's own."""
    layer = build_random_layer("gqa", 32, 8, n_kv_heads=n_kv_heads, window=window)
    assert isinstance(layer, GroupedQueryAttention)
    x_BTD = random_activations(2, 9, 32).requires_grad_()
    ids_BT = document_ids(4, 5).expand(2, -1) if masked else None
    with sdpa_kernel(SDPBackend.MATH):
        expected_BTD = layer_output(layer, x_BTD, ids_BT, "scaled_dot_product")
    if kernel == "flex":
        with torch.no_grad():
            assert_close(layer_output(layer, x_BTD, ids_BT, kernel), expected_BTD, torch.float64, "outputs")
        return
    if kernel == "flash_on_cpu":
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out_BTD = layer_output(layer, x_BTD, ids_BT, "scaled_dot_product")
    else:
        out_BTD = layer_output(layer, x_BTD, ids_BT, kernel)
    assert_close(out_BTD, expected_BTD, torch.float64, "outputs")
    inputs = [x_BTD, *layer.parameters()]
    results = (torch.autograd.grad(output.square().sum(), inputs) for output in (out_BTD, expected_BTD))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, torch.float64, "gradients")


@pytest.mark.parametrize("n_queries", [1, 3, 8])
def test_08_attention_rows_sum_to_one_and_are_zero_above_the_diagonal(n_queries: int) -> None:
    q_BNTH, k_BKSH = random_activations(2, 4, n_queries, 8), random_activations(2, 2, 8, 8, seed=1)
    # Values that are the unit vectors make the output the attention matrix itself.
    context = AttentionContext(8 - n_queries, torch.arange(n_queries)[None])
    weight_BNTS = softmax_attention(q_BNTH, k_BKSH, torch.eye(8, dtype=torch.float64).expand(2, 2, 8, 8), context)
    assert_close(weight_BNTS.sum(-1), torch.ones(2, 4, n_queries), torch.float64, "sums of rows")
    is_future_TS = torch.ones(n_queries, 8, dtype=torch.bool).triu(8 - n_queries + 1)
    assert (weight_BNTS[..., is_future_TS] == 0).all()
    assert (weight_BNTS[..., ~is_future_TS] > 0).all()


def test_09_rotary_scores_depend_on_differences_of_positions_only() -> None:
    q_BTNH, k_BTKH = random_activations(1, 7, 2, 8), random_activations(1, 7, 2, 8, seed=1)

    def scores(shift: int) -> Tensor:
        rotary = compute_rotary(torch.arange(7)[None] + shift, 8, 10000.0, torch.float64)
        return torch.einsum("btnh,bsnh->bnts", apply_rotary(q_BTNH, *rotary), apply_rotary(k_BTKH, *rotary))

    assert_close(scores(12345), scores(0), torch.float64, "scores")
    assert not torch.allclose(scores(0), torch.einsum("btnh,bsnh->bnts", q_BTNH, k_BTKH))


def test_10_mean_pooling_of_equal_heads_is_exact() -> None:
    """In a model: the outputs of all layers stay."""
    grouped = build_random_model(attention_options={"n_kv_heads": 2})
    multi_head = build_random_model(attention_options={"n_kv_heads": 4})
    state = grouped.state_dict()
    for name, value in state.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] = value.view(2, 8, -1).repeat_interleave(2, dim=0).flatten(0, 1)
    multi_head.load_state_dict(state)
    inputs_BT = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    expected_BTV = multi_head(inputs_BT).logits_BTV
    for block in multi_head.typed_blocks():
        assert isinstance(block.attention, GroupedQueryAttention)
        block.attention = convert_to_grouped(block.attention, 2)
    converted_BTV = multi_head(inputs_BT).logits_BTV
    assert expected_BTV is not None
    assert converted_BTV is not None
    assert_close(converted_BTV, expected_BTV, torch.float64, "logits")
    assert multi_head.n_parameters() == grouped.n_parameters()


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4, 8])
def test_10_converted_heads_are_the_means_of_their_groups(n_kv_heads: int) -> None:
    layer = build(8)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    converted = convert_to_grouped(layer, n_kv_heads)
    assert converted.spec == dataclasses.replace(layer.spec, n_kv_heads=n_kv_heads)
    group = 8 // n_kv_heads
    for name in ("k_proj.weight", "v_proj.weight"):
        heads = before[name].split(4)
        for index, mean in enumerate(converted.state_dict()[name].split(4)):
            assert_close(mean, sum(heads[index * group : (index + 1) * group]) / group, torch.float64, name)
    for name in ("q_proj.weight", "o_proj.weight"):
        assert torch.equal(converted.state_dict()[name], before[name])
    # Of its own memory, to be trained, and the other layer as it was.
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    assert all(parameter.requires_grad for parameter in converted.parameters())
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_10_means_are_taken_in_float32() -> None:
    weight_XD = torch.tensor([[256.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    pooled_XD = mean_pool_heads(weight_XD, 4, 1)
    assert pooled_XD.dtype == torch.bfloat16
    assert pooled_XD.item() == torch.tensor(259 / 4).bfloat16().item()
    with pytest.raises(ConfigError, match="n_kv_heads must divide n_heads, but got n_kv_heads=3 and n_heads=4"):
        mean_pool_heads(weight_XD, 4, 3)


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

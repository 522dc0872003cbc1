"""Softmax attention of long rows on a CPU, over tiles of queries and keys, in memory that grows with the tokens only.

Kept for the backward pass are the outputs and the logarithm of each query's sum of weights (Dao, FlashAttention-2,
arXiv 2307.08691, algorithms 1 and 2). Tiles that no query of theirs sees are skipped. In float32 and bfloat16 the work
is done by a C++ kernel (_cpp/tiled_attention.cpp), compiled on first use; in float64, and on a machine without a
compiler, by the same tiles in plain torch.

B batch, T queries, S keys, K key/value heads, G query heads of each, H width of queries and keys, E width of values;
Q queries and C keys of a tile, P = G Q.
"""

import logging
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hydra.errors import ConfigError
from hydra.kernels._cpp.build import load_library

logger = logging.getLogger(__name__)

TILE = 512
"""Queries and keys of a tile in plain torch."""
FLOAT32, PAIRS, AMX = 0, 1, 2
"""How the C++ kernel multiplies bfloat16: as float32, or in pairs by AVX512-BF16, or by AMX."""


def tiled_attention(
    q_BKGTH: Tensor,
    k_BKSH: Tensor,
    v_BKSE: Tensor,
    first_visible_BT: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v; products in the dtype of q with float32 sums, the rest in float32 (float64 for float64).

    Args:
        q_BKGTH, k_BKSH, v_BKSE: in one dtype, any layout; the T queries belong to the last T of the S keys.
        first_visible_BT: int64, (B, T) or (1, T), not decreasing along T. Query t sees the keys from that one to its
            own key S - T + t, both included; its own it must see. None: from the first key on.
        scale: positive, default 1 / sqrt(H).
    Returns:
        out_BKGTE in the dtype of q, in memory as (B, T, K, G, E). It can be differentiated once.
    """
    assert q_BKGTH.shape[3] <= k_BKSH.shape[2], (q_BKGTH.shape, k_BKSH.shape)
    scale = q_BKGTH.shape[-1] ** -0.5 if scale is None else scale
    # What autograd hands over may have its last axis expanded or transposed.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BKGTH, k_BKSH, v_BKSE))
    out_BKGTE, _ = _attend(q, k, v, first_visible_BT, scale)
    return out_BKGTE


@torch.library.custom_op("hydra::tiled_attention", mutates_args=())
def _attend(
    q_BKGTH: Tensor, k_BKSH: Tensor, v_BKSE: Tensor, first_visible_BT: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out_BKGTE, lse_BKGT = _empty_outputs(q_BKGTH, v_BKSE)
    products = native_products(q_BKGTH.dtype)
    if products is None:
        _attend_plainly(q_BKGTH, k_BKSH, v_BKSE, first_visible_BT, scale, out_BKGTE, lse_BKGT)
    else:
        first = None if first_visible_BT is None else first_visible_BT.contiguous()
        torch.ops.hydra.tiled_attention_forward_(q_BKGTH, k_BKSH, v_BKSE, first, scale, products, out_BKGTE, lse_BKGT)
    return out_BKGTE, lse_BKGT


@torch.library.custom_op("hydra::tiled_attention_backward", mutates_args=())
def _differentiate(
    q_BKGTH: Tensor,
    k_BKSH: Tensor,
    v_BKSE: Tensor,
    first_visible_BT: Tensor | None,
    scale: float,
    out_BKGTE: Tensor,
    lse_BKGT: Tensor,
    grad_BKGTE: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _empty_gradients(q_BKGTH, k_BKSH, v_BKSE)
    products = native_products(q_BKGTH.dtype)
    operands = (q_BKGTH, k_BKSH, v_BKSE, first_visible_BT, scale)
    if products is None:
        _differentiate_plainly(*operands, out_BKGTE, lse_BKGT, grad_BKGTE, *grads)
    else:
        first = None if first_visible_BT is None else first_visible_BT.contiguous()
        grad_BKGTE = grad_BKGTE if grad_BKGTE.stride(-1) == 1 else grad_BKGTE.contiguous()
        operands = (q_BKGTH, k_BKSH, v_BKSE, first, scale)
        torch.ops.hydra.tiled_attention_backward_(*operands, products, out_BKGTE, lse_BKGT, grad_BKGTE, *grads)
    return grads


def _empty_outputs(q_BKGTH: Tensor, v_BKSE: Tensor) -> tuple[Tensor, Tensor]:
    n_batch, n_kv_heads, n_group, n_queries, _ = q_BKGTH.shape
    out_BTKGE = q_BKGTH.new_empty(n_batch, n_queries, n_kv_heads, n_group, v_BKSE.shape[-1])
    dtype = torch.promote_types(q_BKGTH.dtype, torch.float32)
    return out_BTKGE.permute(0, 2, 3, 1, 4), q_BKGTH.new_empty(q_BKGTH.shape[:4], dtype=dtype)


def _empty_gradients(q_BKGTH: Tensor, k_BKSH: Tensor, v_BKSE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, _ = _empty_outputs(q_BKGTH, q_BKGTH)
    grad_k, grad_v = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (k_BKSH, v_BKSE))
    return grad_q, grad_k, grad_v


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, v)


@_differentiate.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, out: Tensor, lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(q, k, v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scale = scale


def _backward(ctx: Any, grad_BKGTE: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, first, out, lse = ctx.saved_tensors
    return (*_differentiate(q, k, v, first, ctx.scale, out, lse, grad_BKGTE), None, None)


_attend.register_autograd(_backward, setup_context=_save)


@cache
def native_products(dtype: torch.dtype) -> int | None:
    """How the C++ kernel multiplies on this machine; None where plain torch does the work."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    try:
        load_library("tiled_attention")
    except ConfigError as error:
        logger.warning("attention of long rows runs in plain torch, which is slower: %s", error)
        return None
    if dtype == torch.float32 or not torch.ops.hydra.tiled_attention_has_pairs():
        return FLOAT32
    return AMX if torch.cpu._is_amx_tile_supported() else PAIRS


def _tiles(n_queries: int, n_keys: int, first_visible_BT: Tensor | None) -> Iterator[tuple[slice, slice, bool]]:
    """Queries and keys of the tiles in which something is seen, and whether all of it is."""
    n_past = n_keys - n_queries
    for query in range(0, n_queries, TILE):
        queries = slice(query, min(query + TILE, n_queries))
        lowest = highest = 0
        if first_visible_BT is not None:
            lowest = int(first_visible_BT[:, queries.start].min())
            highest = int(first_visible_BT[:, queries.stop - 1].max())
        for key in range(lowest // TILE * TILE, n_past + queries.stop, TILE):
            keys = slice(key, min(key + TILE, n_past + queries.stop))
            yield queries, keys, keys.stop - 1 <= n_past + queries.start and keys.start >= highest


def _scores(
    q_BKPH: Tensor, k_BKCH: Tensor, first_visible_BT: Tensor | None, n_past: int, tile: tuple[slice, slice, bool]
) -> Tensor:
    """Scaled scores (B, K, G, Q, C) in at least float32, minus infinity where a query does not see a key."""
    queries, keys, is_all_seen = tile
    scores_BKPC = (q_BKPH @ k_BKCH.transpose(2, 3)).to(torch.promote_types(q_BKPH.dtype, torch.float32))
    scores_BKGQC = scores_BKPC.unflatten(2, (-1, queries.stop - queries.start))
    if is_all_seen:
        return scores_BKGQC
    keys_C = torch.arange(keys.start, keys.stop)
    is_hidden_BQC = (keys_C > torch.arange(n_past + queries.start, n_past + queries.stop)[:, None])[None]
    if first_visible_BT is not None:
        is_hidden_BQC = is_hidden_BQC | (keys_C < first_visible_BT[:, queries, None])
    return scores_BKGQC.masked_fill(is_hidden_BQC[:, None, None], -torch.inf)


def _attend_plainly(
    q_BKGTH: Tensor,
    k_BKSH: Tensor,
    v_BKSE: Tensor,
    first_visible_BT: Tensor | None,
    scale: float,
    out_BKGTE: Tensor,
    lse_BKGT: Tensor,
) -> None:
    n_queries, n_keys = q_BKGTH.shape[3], k_BKSH.shape[2]
    floor = torch.finfo(lse_BKGT.dtype).min
    lse_BKGT.fill_(floor)
    # Every tile changes outputs that are complete for the keys so far.
    sums_BKGTE = torch.zeros_like(out_BKGTE, dtype=lse_BKGT.dtype)
    for tile in _tiles(n_queries, n_keys, first_visible_BT):
        queries, keys, _ = tile
        q_BKPH = (q_BKGTH[:, :, :, queries] * scale).flatten(2, 3)
        scores_BKGQC = _scores(q_BKPH, k_BKSH[:, :, keys], first_visible_BT, n_keys - n_queries, tile)
        lse_BKGQ = lse_BKGT[..., queries]
        new_lse_BKGQ = torch.logaddexp(scores_BKGQC.logsumexp(-1), lse_BKGQ)
        weights_BKGQC = (scores_BKGQC - new_lse_BKGQ[..., None]).exp().to(q_BKGTH.dtype)
        part_BKPE = weights_BKGQC.flatten(2, 3) @ v_BKSE[:, :, keys]
        sums_BKGQE = sums_BKGTE[:, :, :, queries]
        sums_BKGQE.mul_((lse_BKGQ - new_lse_BKGQ).exp()[..., None]).add_(part_BKPE.view(sums_BKGQE.shape))
        lse_BKGQ.copy_(new_lse_BKGQ)
    out_BKGTE.copy_(sums_BKGTE)


def _differentiate_plainly(
    q_BKGTH: Tensor,
    k_BKSH: Tensor,
    v_BKSE: Tensor,
    first_visible_BT: Tensor | None,
    scale: float,
    out_BKGTE: Tensor,
    lse_BKGT: Tensor,
    grad_BKGTE: Tensor,
    grad_q_BKGTH: Tensor,
    grad_k_BKSH: Tensor,
    grad_v_BKSE: Tensor,
) -> None:
    n_queries, n_keys = q_BKGTH.shape[3], k_BKSH.shape[2]
    dtype = lse_BKGT.dtype
    share_BKGT1 = (grad_BKGTE.to(dtype) * out_BKGTE.to(dtype)).sum(-1, keepdim=True)
    totals = [torch.zeros_like(x, dtype=dtype) for x in (grad_q_BKGTH, grad_k_BKSH, grad_v_BKSE)]
    total_q_BKGTH, total_k_BKSH, total_v_BKSE = totals
    for tile in _tiles(n_queries, n_keys, first_visible_BT):
        queries, keys, _ = tile
        q_BKPH = (q_BKGTH[:, :, :, queries] * scale).flatten(2, 3)
        grad_BKPE = grad_BKGTE[:, :, :, queries].flatten(2, 3)
        scores_BKGQC = _scores(q_BKPH, k_BKSH[:, :, keys], first_visible_BT, n_keys - n_queries, tile)
        weights_BKGQC = (scores_BKGQC - lse_BKGT[..., queries, None]).exp()
        grad_weights_BKPC = grad_BKPE @ v_BKSE[:, :, keys].transpose(2, 3)
        grad_scores_BKGQC = weights_BKGQC * (
            grad_weights_BKPC.view(weights_BKGQC.shape) - share_BKGT1[:, :, :, queries]
        )
        weights_BKPC = weights_BKGQC.flatten(2, 3).to(q_BKGTH.dtype)
        grad_scores_BKPC = grad_scores_BKGQC.flatten(2, 3).to(q_BKGTH.dtype)
        total_v_BKSE[:, :, keys] += weights_BKPC.transpose(2, 3) @ grad_BKPE
        total_k_BKSH[:, :, keys] += grad_scores_BKPC.transpose(2, 3) @ q_BKPH
        grad_q_BKPH = grad_scores_BKPC @ k_BKSH[:, :, keys] * scale
        total_q_BKGTH[:, :, :, queries] += grad_q_BKPH.view(total_q_BKGTH[:, :, :, queries].shape)
    for grad, total in zip((grad_q_BKGTH, grad_k_BKSH, grad_v_BKSE), totals, strict=True):
        grad.copy_(total)

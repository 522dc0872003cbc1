"""Softmax attention as matrix products over blocks of queries, for a CPU and sequences that are not long.

The scores of a block reach to its last query only. The weights are kept for the backward pass, which then needs
neither scores nor exponentials, and no mask (Dao et al., FlashAttention, arXiv 2205.14135, B.2, without its tiling).

B batch, T queries, S keys, K key/value heads, G query heads of each, H head width, E width of value heads; X = B K,
Q queries of a block, P = G Q, C any of H, E and S.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERY_BLOCK = 64
"""Queries of a block: larger ones have more keys that their first queries do not see, smaller ones thin products."""
MAX_BLOCKS = 8
"""Longer sequences get larger blocks instead: each is code of its own to a compiler."""


def blocked_attention(
    q_BKGTH: Tensor, k_BKSH: Tensor, v_BKSE: Tensor, mask_B1TS: Tensor, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T + mask) v; products in the dtype of q, the rest in float32 (float64 for float64 input).

    Args:
        q_BKGTH, k_BKSH, v_BKSE: in one dtype; the T queries belong to the last T of the S keys. Values may have
            another width E.
        mask_B1TS: 0 or -inf, causal; its batch may be 1. A row that sees nothing gives zeros.
        scale: default 1 / sqrt(H).
    Returns:
        out_BKGTE in the dtype of q. It can be differentiated once.
    """
    assert q_BKGTH.shape[3] <= k_BKSH.shape[2], (q_BKGTH.shape, k_BKSH.shape)
    q_BKGTH = q_BKGTH * (q_BKGTH.shape[-1] ** -0.5 if scale is None else scale)
    return _BlockedAttention.apply(q_BKGTH, k_BKSH.flatten(0, 1), v_BKSE.flatten(0, 1), mask_B1TS)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BKGTH: Tensor, k_XSH: Tensor, v_XSE: Tensor, mask_B1TS: Tensor) -> Tensor:
        compute_dtype = torch.promote_types(q_BKGTH.dtype, torch.float32)
        blocks, weights, sums = [], [], []
        for start, stop, n_visible in _query_blocks(q_BKGTH.shape[3], k_XSH.shape[1]):
            q_XPH = _as_rows(q_BKGTH[:, :, :, start:stop])
            scores_XPS = torch.bmm(q_XPH, _first_rows(k_XSH, n_visible).transpose(1, 2))
            scores_BKGQS = scores_XPS.view(*q_BKGTH.shape[:3], stop - start, n_visible).to(compute_dtype)
            scores_BKGQS = scores_BKGQS + mask_B1TS[:, :, None, start:stop, :n_visible].to(compute_dtype)
            # A row that sees nothing has -inf for its maximum; the floor makes its weights 0 instead of NaN.
            top_BKGQ1 = scores_BKGQS.amax(-1, keepdim=True).clamp(min=torch.finfo(compute_dtype).min)
            weights_BKGQS = (scores_BKGQS - top_BKGQ1).exp().to(q_BKGTH.dtype)
            # The largest weight of a row that sees something is 1. Their sum divides the H columns of the result, and
            # not the S of the weights.
            sums_BKGQ1 = weights_BKGQS.to(compute_dtype).sum(-1, keepdim=True).clamp(min=1.0)
            out_XPE = torch.bmm(_as_rows(weights_BKGQS), _first_rows(v_XSE, n_visible))
            out_BKGQE = out_XPE.view(*q_BKGTH.shape[:3], stop - start, -1).to(compute_dtype) / sums_BKGQ1
            blocks.append(out_BKGQE.to(q_BKGTH.dtype))
            if any(ctx.needs_input_grad):
                weights.append(weights_BKGQS)
                sums.append(sums_BKGQ1)
        ctx.save_for_backward(q_BKGTH, k_XSH, v_XSE, *weights, *sums)
        return torch.cat(blocks, dim=3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BKGTE: Tensor) -> tuple[Tensor | None, ...]:
        q_BKGTH, k_XSH, v_XSE, *kept = ctx.saved_tensors
        weights, sums = kept[: len(kept) // 2], kept[len(kept) // 2 :]
        grads_q, grads_k, grads_v = [], [], []
        blocks = _query_blocks(q_BKGTH.shape[3], k_XSH.shape[1])
        for (start, stop, n_visible), weights_BKGQS, sums_BKGQ1 in zip(blocks, weights, sums, strict=True):
            weights_XPS = _as_rows(weights_BKGQS)
            # Of the weighted values before they are divided.
            grad_XPE = _as_rows((grad_BKGTE[:, :, :, start:stop] / sums_BKGQ1).to(q_BKGTH.dtype))
            grads_v.append(torch.bmm(weights_XPS.transpose(1, 2), grad_XPE))
            grad_weights_XPS = torch.bmm(grad_XPE, _first_rows(v_XSE, n_visible).transpose(1, 2))
            # What a weight takes from the others through the sum.
            parts_BKGQS = grad_weights_XPS.view_as(weights_BKGQS) * weights_BKGQS.to(sums_BKGQ1.dtype)
            share_BKGQ1 = parts_BKGQS.sum(-1, keepdim=True) / sums_BKGQ1
            grad_scores_XPS = _as_rows((parts_BKGQS - weights_BKGQS * share_BKGQ1).to(q_BKGTH.dtype))
            grad_q_XPH = torch.bmm(grad_scores_XPS, _first_rows(k_XSH, n_visible))
            grads_q.append(grad_q_XPH.view(*q_BKGTH.shape[:3], stop - start, -1))
            grads_k.append(torch.bmm(grad_scores_XPS.transpose(1, 2), _as_rows(q_BKGTH[:, :, :, start:stop])))
        grad_k_XSH, grad_v_XSE = (_add_first_rows(grads, sums[0].dtype) for grads in (grads_k, grads_v))
        return torch.cat(grads_q, dim=3), grad_k_XSH, grad_v_XSE, None


def _query_blocks(n_queries: int, n_keys: int) -> Iterator[tuple[int, int, int]]:
    """First query, the one behind the last, and how many keys they see."""
    length = QUERY_BLOCK * max(1, -(-n_queries // (QUERY_BLOCK * MAX_BLOCKS)))
    for start in range(0, n_queries, length):
        stop = min(start + length, n_queries)
        yield start, stop, n_keys - n_queries + stop


def _as_rows(block_BKGQC: Tensor) -> Tensor:
    """(X, P, C): the rows that share keys and values together."""
    return block_BKGQC.flatten(0, 1).flatten(1, 2)


def _first_rows(x_XSH: Tensor, n_rows: int) -> Tensor:
    """(X, n_rows, H), contiguous: a product would copy anything else by itself, and slowly when it is transposed."""
    return x_XSH[:, :n_rows].contiguous()


def _add_first_rows(parts: list[Tensor], compute_dtype: torch.dtype) -> Tensor:
    """The sum of tensors (X, n, H) of growing n that stand for the first n of all rows, (X, S, H) in their dtype.

    Piece by piece, so that compiled code need not ask for each number which parts reach it.
    """
    pieces = []
    for index, (start, stop) in enumerate(pairwise([0, *(part.shape[1] for part in parts)])):
        total = parts[index][:, start:stop].to(compute_dtype)
        for part in parts[index + 1 :]:
            total = total + part[:, start:stop]
        pieces.append(total.to(parts[0].dtype))
    return torch.cat(pieces, dim=1)

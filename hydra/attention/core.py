"""Softmax attention of given queries, keys and values by a named kernel: the one place that knows them.

B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head width; X = B K, Q queries of a block,
P = G Q.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra.attention.masks import causal_mask
from hydra.errors import ConfigError
from hydra.kernels.decode import native_single_query_attention

KERNELS = ("scaled_dot_product", "blocked")
"""`scaled_dot_product`: torch's own choice of implementation. `blocked`: matrix products over blocks of queries."""
DECODE_KERNEL = "single_query"
"""For one query token in each row on a CPU, with a mask; needs hydra.kernels.decode.load_native."""

QUERY_BLOCK = 64
"""Queries of a block: it skips the keys after its last query, and larger blocks skip fewer."""
MAX_BLOCKED_TOKENS = 1024
"""`blocked` keeps a score for every visible pair until the backward pass; beyond this length that is too much."""


def choose_kernel(device_type: str, n_tokens: int) -> tuple[str, str]:
    """What `auto` stands for when sequences of n_tokens are trained on a device, and why."""
    if device_type != "cpu":
        return "scaled_dot_product", "on a GPU torch has fused kernels"
    if n_tokens > MAX_BLOCKED_TOKENS:
        return "scaled_dot_product", f"more than {MAX_BLOCKED_TOKENS} tokens in a row: scores would fill the memory"
    return "blocked", "on a CPU plain matrix products are faster than torch's fused attention"


def softmax_attention(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    mask_B1TS: Tensor | None = None,
    kernel: str = "scaled_dot_product",
) -> Tensor:
    """softmax(q k^T / sqrt(H)) v, where query head n reads key/value head n // (N / K).

    Args:
        q_BNTH, k_BKSH, v_BKSH: the T queries belong to the last T of the S keys.
        mask_B1TS: what is added to the scores (0 or -inf), complete and causal. None: causal, aligned so that the last
            query sees every key. A row that sees nothing gives zeros.
        kernel: one of KERNELS, or DECODE_KERNEL.
    Returns:
        out_BNTH in the dtype of q_BNTH.
    Raises:
        ConfigError: there is no such kernel.
    """
    if kernel == "scaled_dot_product":
        return _scaled_dot_product(q_BNTH, k_BKSH, v_BKSH, mask_B1TS)
    if kernel == "blocked":
        return _blocked(q_BNTH, k_BKSH, v_BKSH, mask_B1TS)
    if kernel == DECODE_KERNEL:
        assert mask_B1TS is not None, "a decode step has a mask"
        return native_single_query_attention(q_BNTH, k_BKSH, v_BKSH, mask_B1TS)
    raise ConfigError(f"attention kernel must be one of {', '.join(KERNELS)}, but got {kernel!r}")


def _scaled_dot_product(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask_B1TS: Tensor | None) -> Tensor:
    n_queries, n_keys = q_BNTH.shape[2], k_BKSH.shape[2]
    # is_causal aligns top-left, which is right only for a square; one query sees everything and needs no mask.
    is_causal = mask_B1TS is None and n_queries == n_keys and n_queries > 1
    if mask_B1TS is not None:
        mask_B1TS = mask_B1TS.to(q_BNTH.dtype)
    elif 1 < n_queries < n_keys:
        mask_B1TS = causal_mask(n_queries, n_keys, q_BNTH.device)
    return F.scaled_dot_product_attention(
        q_BNTH,
        k_BKSH,
        v_BKSH,
        attn_mask=mask_B1TS,
        is_causal=is_causal,
        enable_gqa=q_BNTH.shape[1] != k_BKSH.shape[1],
    )


def _blocked(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask_B1TS: Tensor | None) -> Tensor:
    """Each block of queries against the keys up to its last one: one product for the scores, one for the values.

    The sum that normalises a row divides the result, which has H columns, and not the weights, which have S.
    """
    n_batch, n_heads, n_queries, width = q_BNTH.shape
    n_kv_heads, n_keys = k_BKSH.shape[1], k_BKSH.shape[2]
    group, n_past = n_heads // n_kv_heads, n_keys - n_queries
    compute_dtype = torch.promote_types(q_BNTH.dtype, torch.float32)
    q_BKGTH = (q_BNTH * width**-0.5).unflatten(1, (n_kv_heads, group))
    keys_XHS, values_XSH = k_BKSH.flatten(0, 1).transpose(1, 2), v_BKSH.flatten(0, 1)
    if mask_B1TS is None:
        is_visible = causal_mask(n_queries, n_keys, q_BNTH.device)
    blocks = []
    for start in range(0, n_queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, n_queries)
        n_visible = n_past + stop
        q_XPH = q_BKGTH[:, :, :, start:stop].reshape(n_batch * n_kv_heads, group * (stop - start), width)
        scores_XPS = torch.bmm(q_XPH, keys_XHS[:, :, :n_visible])
        scores_BKGQS = scores_XPS.view(n_batch, n_kv_heads, group, stop - start, n_visible).to(compute_dtype)
        if mask_B1TS is None:
            scores_BKGQS = scores_BKGQS.masked_fill(~is_visible[start:stop, :n_visible], -torch.inf)
        else:
            scores_BKGQS = scores_BKGQS + mask_B1TS[:, :, None, start:stop, :n_visible].to(compute_dtype)
        # A row that sees nothing has -inf for its maximum; the floor makes its weights 0 instead of NaN.
        top_BKGQ1 = scores_BKGQS.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(compute_dtype).min)
        weights_BKGQS = (scores_BKGQS - top_BKGQ1).exp().to(q_BNTH.dtype)
        sums_BKGQ1 = weights_BKGQS.to(compute_dtype).sum(-1, keepdim=True)
        out_XPH = torch.bmm(weights_BKGQS.view_as(scores_XPS), values_XSH[:, :n_visible])
        out_BKGQH = out_XPH.view(n_batch, n_kv_heads, group, stop - start, width)
        blocks.append(out_BKGQH.to(compute_dtype) / sums_BKGQ1.clamp(min=torch.finfo(compute_dtype).tiny))
    return torch.cat(blocks, dim=3).flatten(1, 2).to(q_BNTH.dtype)

"""Softmax attention of given queries, keys and values by a named kernel: the one place that knows them.

B batch, T queries, S keys, N query heads, K key/value heads, H head width.
"""

import torch.nn.functional as F
from torch import Tensor

from hydra.attention.masks import causal_mask, to_additive
from hydra.errors import ConfigError
from hydra.kernels.blocked_attention import blocked_attention
from hydra.kernels.decode import native_single_query_attention

KERNELS = ("scaled_dot_product", "blocked")
"""`scaled_dot_product`: torch's own choice of implementation. `blocked`: hydra.kernels.blocked_attention."""
DECODE_KERNEL = "single_query"
"""For one query token in each row on a CPU, with a mask; needs hydra.kernels.decode.load_native."""

MAX_BLOCKED_TOKENS = 1024
"""`blocked` keeps a weight for every visible pair until the backward pass; beyond this length that is too much."""


def choose_kernel(device_type: str, n_tokens: int) -> tuple[str, str]:
    """What `auto` stands for when sequences of n_tokens are trained on a device, and why."""
    if device_type != "cpu":
        return "scaled_dot_product", "on a GPU torch has fused kernels"
    if n_tokens > MAX_BLOCKED_TOKENS:
        return "scaled_dot_product", f"more than {MAX_BLOCKED_TOKENS} tokens in a row: weights would fill the memory"
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
    n_kv_heads, n_queries, n_keys = k_BKSH.shape[1], q_BNTH.shape[2], k_BKSH.shape[2]
    if mask_B1TS is None:
        mask_B1TS = to_additive(causal_mask(n_queries, n_keys, q_BNTH.device), q_BNTH.dtype)[None, None]
    return blocked_attention(q_BNTH.unflatten(1, (n_kv_heads, -1)), k_BKSH, v_BKSH, mask_B1TS).flatten(1, 2)

"""Softmax attention of given queries, keys and values: the one place that knows scaled_dot_product_attention.

B batch, T queries, S keys, N query heads, K key/value heads, H head width.
"""

import torch.nn.functional as F
from torch import Tensor

from hydra.attention.masks import causal_mask


def softmax_attention(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask_B1TS: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(H)) v, where query head n reads key/value head n // (N / K).

    Args:
        q_BNTH, k_BKSH, v_BKSH: the T queries belong to the last T of the S keys.
        mask_B1TS: what is added to the scores (0 or -inf), complete: nothing is masked beside it. None: causal,
            aligned so that the last query sees every key. A row that sees nothing gives zeros.
    Returns:
        out_BNTH in the dtype of q_BNTH.
    """
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

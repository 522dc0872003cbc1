"""Softmax attention of given queries, keys and values by a named kernel: the one place that knows them.

B batch, T queries, S keys, N query heads, K key/value heads, H head width.
"""

import importlib.metadata
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra.attention.masks import AttentionContext, FlashSequences, causal_mask, to_additive
from hydra.errors import ConfigError
from hydra.kernels.blocked_attention import blocked_attention
from hydra.kernels.decode import native_single_query_attention
from hydra.kernels.tiled_attention import tiled_attention

KERNELS = ("scaled_dot_product", "blocked", "tiled", "flex", "flash")
"""`scaled_dot_product`: torch's own choice of implementation. `blocked`: hydra.kernels.blocked_attention. `tiled`:
hydra.kernels.tiled_attention. `flex`: torch's FlexAttention, which skips what documents and windows hide, as `tiled`
does. `flash`: the package flash-attn."""
ONLY_ON_GPU = ("flex", "flash")
DECODE_KERNEL = "single_query"
"""For one query token in each row on a CPU, with a mask; needs hydra.kernels.decode.load_native."""

MAX_BLOCKED_TOKENS = 1024
"""`blocked` keeps a weight for every visible pair until the backward pass; beyond this length that is too much."""
MAX_FLASH_WIDTH = 256
"""Channels of a head that flash-attn 2 takes."""


def choose_kernel(device_type: str, n_tokens: int) -> tuple[str, str]:
    """What `auto` stands for when sequences of n_tokens are trained on a device, and why."""
    if device_type != "cpu":
        return "scaled_dot_product", "on a GPU torch has fused kernels"
    if n_tokens > MAX_BLOCKED_TOKENS:
        return "tiled", f"more than {MAX_BLOCKED_TOKENS} tokens in a row: weights would fill the memory"
    return "blocked", "on a CPU plain matrix products are faster than torch's fused attention"


def check_kernel(kernel: str, device_type: str, dtype: torch.dtype | None = None, score_width: int = 0) -> None:
    """Return if the kernel can train on this device.

    Args:
        kernel: one of KERNELS.
        device_type: `cpu` or `cuda`.
        dtype: of queries, keys and values; None when it is not settled yet.
        score_width: channels of a head; 0 when they are not settled yet.
    Raises:
        ConfigError: it cannot, with the reason.
    """
    if kernel not in KERNELS:
        raise ConfigError(f"attention kernel must be one of {', '.join(KERNELS)}, but got {kernel!r}")
    reason = ""
    if kernel == "tiled" and device_type != "cpu":
        reason = f"tiled attention computes on a CPU only, and the device is {device_type}"
    if kernel == "flex" and device_type != "cuda":
        reason = f"FlexAttention has a backward pass on a GPU only, and the device is {device_type}"
    if kernel == "flash":
        if device_type != "cuda":
            reason = f"flash-attn computes on a GPU only, and the device is {device_type}"
        elif importlib.util.find_spec("flash_attn") is None:
            reason = "flash-attn is not installed; pip install 'hydra-workspace[flash]' compiles it"
        elif int(importlib.metadata.version("flash_attn").split(".")[0]) < 2:
            reason = f"flash-attn must be 2 or newer, and {importlib.metadata.version('flash_attn')} is installed"
        elif dtype not in (None, torch.bfloat16, torch.float16):
            reason = f"flash-attn takes bfloat16 and float16 only, and the dtype is {dtype}"
        elif score_width > MAX_FLASH_WIDTH:
            reason = f"flash-attn takes heads of at most {MAX_FLASH_WIDTH} channels, and these have {score_width}"
    if reason:
        raise ConfigError(
            f"attention_kernel must be one that can train here, but got {kernel!r}: {reason}; use attention_kernel auto"
        )


def softmax_attention(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSE: Tensor, context: AttentionContext, *, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T) v over what each query sees, where query head n reads key/value head n // (N / K).

    Args:
        q_BNTH, k_BKSH, v_BKSE: the T queries belong to the last T of the S keys. Values may have another width E.
        context: of the layer, from AttentionContext.specialise: what each query sees, and by which kernel. A row of a
            mask that sees nothing gives zeros.
        scale: default 1 / sqrt(H).
    Returns:
        out_BNTE in the dtype of q_BNTH.
    """
    scale = q_BNTH.shape[-1] ** -0.5 if scale is None else scale
    return _COMPUTE[context.kernel](q_BNTH, k_BKSH, v_BKSE, context, scale)


def _scaled_dot_product(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSE: Tensor, context: AttentionContext, scale: float) -> Any:
    mask_B1TS, n_queries, n_keys = context.mask_B1TS, q_BNTH.shape[2], k_BKSH.shape[2]
    # is_causal aligns top-left, which is right only for a square; one query sees everything and needs no mask.
    is_causal = mask_B1TS is None and n_queries == n_keys and n_queries > 1
    if mask_B1TS is not None:
        mask_B1TS = mask_B1TS.to(q_BNTH.dtype)
    elif 1 < n_queries < n_keys:
        mask_B1TS = causal_mask(n_queries, n_keys, q_BNTH.device)
    is_grouped = q_BNTH.shape[1] != k_BKSH.shape[1]
    return F.scaled_dot_product_attention(
        q_BNTH, k_BKSH, v_BKSE, attn_mask=mask_B1TS, is_causal=is_causal, scale=scale, enable_gqa=is_grouped
    )


def _blocked(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSE: Tensor, context: AttentionContext, scale: float) -> Tensor:
    mask_B1TS, n_kv_heads, n_queries, n_keys = context.mask_B1TS, k_BKSH.shape[1], q_BNTH.shape[2], k_BKSH.shape[2]
    if mask_B1TS is None:
        mask_B1TS = to_additive(causal_mask(n_queries, n_keys, q_BNTH.device), q_BNTH.dtype)[None, None]
    q_BKGTH = q_BNTH.unflatten(1, (n_kv_heads, -1))
    return blocked_attention(q_BKGTH, k_BKSH, v_BKSE, mask_B1TS, scale).flatten(1, 2)


def _tiled(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSE: Tensor, context: AttentionContext, scale: float) -> Tensor:
    q_BKGTH = q_BNTH.unflatten(1, (k_BKSH.shape[1], -1))
    return tiled_attention(q_BKGTH, k_BKSH, v_BKSE, context.first_visible_BT, scale).flatten(1, 2)


def _single_query(q_BN1H: Tensor, k_BKSH: Tensor, v_BKSE: Tensor, context: AttentionContext, scale: float) -> Tensor:
    assert context.mask_B1TS is not None, "a decode step has a mask"
    assert scale == q_BN1H.shape[-1] ** -0.5, scale
    assert q_BN1H.shape[-1] == v_BKSE.shape[-1], "the C++ loops share one width"
    return native_single_query_attention(q_BN1H, k_BKSH, v_BKSE, context.mask_B1TS)


def _flex(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSE: Tensor, context: AttentionContext, scale: float) -> Any:
    from torch.nn.attention.flex_attention import flex_attention  # imports torch's compiler

    is_grouped = q_BNTH.shape[1] != k_BKSH.shape[1]
    return flex_attention(q_BNTH, k_BKSH, v_BKSE, block_mask=context.kernel_data, scale=scale, enable_gqa=is_grouped)


def _flash(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSE: Tensor, context: AttentionContext, scale: float) -> Any:
    """By flash-attn's functions of fixed or, where documents or a window hide something, of variable length."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    # flash-attn takes one width: zeros add nothing to scores, and columns of zeros to outputs.
    width, value_width = max(q_BNTH.shape[-1], v_BKSE.shape[-1]), v_BKSE.shape[-1]
    q, k, v = (F.pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in (q_BNTH, k_BKSH, v_BKSE))
    sequences: FlashSequences = context.kernel_data
    how = {"softmax_scale": scale, "causal": True, "window_size": sequences.window}
    if sequences.starts is None:
        # Causal from the bottom right since flash-attn 2.1.
        return flash_attn_func(q, k, v, **how)[..., :value_width].transpose(1, 2)
    starts, longest = sequences.starts, q.shape[1]
    packed = (x.flatten(0, 1) for x in (q, k, v))
    out_XNE = flash_attn_varlen_func(*packed, starts, starts, longest, longest, **how)
    return out_XNE[..., :value_width].unflatten(0, q.shape[:2]).transpose(1, 2)


_COMPUTE = {
    "scaled_dot_product": _scaled_dot_product,
    "blocked": _blocked,
    "tiled": _tiled,
    "flex": _flex,
    "flash": _flash,
    DECODE_KERNEL: _single_query,
}

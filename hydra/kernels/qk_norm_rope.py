"""Queries or keys normalised over each head, scaled, and rotated by their position: what stands before the scores.

The rotary embedding (Su et al., arXiv 2104.09864, eq. 34) pairs channel r with channel R + r, as in GPT-NeoX.

B batch, T tokens, N heads (of queries, or of keys), H head width, R half of the rotated width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def qk_norm_rope(
    x_BTNH: Tensor,
    cos_BT1R: Tensor,
    sin_BT1R: Tensor,
    *,
    norm_eps: float | None,
    temp_N: Tensor | None = None,
    dtype: torch.dtype | None = None,
    kernels: str = "torch",
) -> Tensor:
    """rotate(x / sqrt(mean(x**2) + norm_eps) * exp(temp)) over each head.

    Args:
        x_BTNH: any floating dtype; with kernels=triton float32, float16 or bfloat16.
        cos_BT1R, sin_BT1R: of hydra.layers.rotary.compute_rotary, batch B or 1.
        norm_eps: added to the mean square; None: x is not normalised. With a tiny one this is the L2 norm of CCA,
            sqrt(H) x / |x| (arXiv 2510.04476, eqs. 9, 10).
        temp_N: logarithm of a factor for each head; None: no factor.
        dtype: of the result; default that of x.
        kernels: one of hydra.kernels.dispatch.KERNELS.
    Returns:
        (B, T, N, H). torch rounds to the dtype of x after each of the first two steps, triton only at the end.
    Raises:
        ConfigError: kernels=triton cannot take this dtype or width.
    """
    if kernels == "torch":
        if norm_eps is not None:
            x_BTNH = F.rms_norm(x_BTNH, (x_BTNH.shape[-1],), eps=norm_eps)
        if temp_N is not None:
            x_BTNH = x_BTNH * temp_N.to(x_BTNH.dtype).exp()[:, None]
        return apply_rotary(x_BTNH, cos_BT1R, sin_BT1R, dtype)
    from hydra.kernels._triton import qk_norm_rope as triton_kernels

    return triton_kernels.qk_norm_rope(x_BTNH, cos_BT1R, sin_BT1R, norm_eps, temp_N).to(dtype or x_BTNH.dtype)


def apply_rotary(x_BTNH: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rotate the first 2R channels of every head, channel r with channel R + r; the others pass unchanged.

    Computed in the dtype of the angles (float32 or float64) and returned in `dtype`, by default that of x_BTNH. Norms
    are preserved.
    """
    half = cos_BT1R.shape[-1]
    first, second, rest = x_BTNH.split([half, half, x_BTNH.shape[-1] - 2 * half], dim=-1)
    first, second = first.to(cos_BT1R.dtype), second.to(cos_BT1R.dtype)
    # Rounded before they are joined, so that compiled code writes each number once.
    rotated = [first * cos_BT1R - second * sin_BT1R, second * cos_BT1R + first * sin_BT1R]
    parts = [part.to(dtype or x_BTNH.dtype) for part in (rotated if rest.shape[-1] == 0 else [*rotated, rest])]
    return torch.cat(parts, dim=-1)

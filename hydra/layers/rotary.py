"""Rotary position embedding (Su et al., arXiv 2104.09864, eq. 34), on halves instead of neighbours as in GPT-NeoX.

B batch (or 1, shared by all rows), T tokens, N heads, H head width, R half of the rotated width.
"""

import torch
from torch import Tensor


def compute_rotary(positions_BT: Tensor, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles position * base**(-2r/width).

    Args:
        positions_BT: integer positions, (B, T) or (1, T).
        width: how many channels of a head are rotated; even.
        base: the theta of the paper, 10000 there.
        dtype: dtype of the activations; angles are computed in it, but never below float32.
    Returns:
        cos_BT1R, sin_BT1R with R = width / 2, ready to broadcast over heads.
    """
    assert width % 2 == 0, width
    dtype = torch.promote_types(dtype, torch.float32)
    exponents_R = torch.arange(0, width, 2, device=positions_BT.device, dtype=dtype) / width
    angles_BT1R = positions_BT[:, :, None, None].to(dtype) * base**-exponents_R
    return angles_BT1R.cos(), angles_BT1R.sin()


def apply_rotary(x_BTNH: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor) -> Tensor:
    """Rotate the first 2R channels of every head, channel r with channel R + r; the others pass unchanged.

    Computed in the dtype of the angles (float32 or float64) and returned in that of x_BTNH. Norms are preserved.
    """
    half = cos_BT1R.shape[-1]
    first, second, rest = x_BTNH.split([half, half, x_BTNH.shape[-1] - 2 * half], dim=-1)
    first, second = first.to(cos_BT1R.dtype), second.to(cos_BT1R.dtype)
    # Rounded before they are joined, so that compiled code writes each number once.
    rotated = [first * cos_BT1R - second * sin_BT1R, second * cos_BT1R + first * sin_BT1R]
    parts = [part.to(x_BTNH.dtype) for part in rotated]
    return torch.cat(parts if rest.shape[-1] == 0 else [*parts, rest], dim=-1)

"""Rotary position embedding (Su et al., arXiv 2104.09864, eq. 34), on halves instead of neighbours as in GPT-NeoX.

B batch (or 1, shared by all rows), T tokens, N heads, H head width, R half of the rotated width.
"""

import torch
from torch import Tensor

from hydra.kernels.qk_norm_rope import apply_rotary

__all__ = ["apply_rotary", "compute_rotary"]


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

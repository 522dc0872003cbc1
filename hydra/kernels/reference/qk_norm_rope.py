"""Norm over heads, temperature and rotary embedding, in float64 and step by step.

B batch, T tokens, N heads, H head width, R half of the rotated width.
"""

import torch
from torch import Tensor


def qk_norm_rope(
    x_BTNH: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor, norm_eps: float | None, temp_N: Tensor | None
) -> Tensor:
    """See hydra.kernels.qk_norm_rope: complex numbers first + i second, times cos + i sin; gradients by autograd."""
    x_BTNH = x_BTNH.double()
    if norm_eps is not None:
        mean_square = x_BTNH.square().sum(dim=-1, keepdim=True) / x_BTNH.shape[-1]
        x_BTNH = x_BTNH / (mean_square + norm_eps).sqrt()
    if temp_N is not None:
        x_BTNH = x_BTNH * temp_N.double().exp()[:, None]
    half = cos_BT1R.shape[-1]
    pairs_BTNR = torch.complex(x_BTNH[..., :half], x_BTNH[..., half : 2 * half])
    rotated_BTNR = pairs_BTNR * torch.complex(cos_BT1R.double(), sin_BT1R.double())
    return torch.cat([rotated_BTNR.real, rotated_BTNR.imag, x_BTNH[..., 2 * half :]], dim=-1)

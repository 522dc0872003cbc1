"""Root-mean-square norm of rows (Zhang and Sennrich, arXiv 1910.07467, eq. 4).

D width of a row.
"""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, kernels: str = "torch") -> Tensor:
    """x / sqrt(mean(x**2) + eps) * weight over the last axis.

    Args:
        x: (..., D), any floating dtype; with kernels=triton float32, float16 or bfloat16.
        weight_D: gains.
        eps: added to the mean square.
        kernels: one of hydra.kernels.dispatch.KERNELS.
    Returns:
        In the shape and dtype of x; the arithmetic is float32 at least.
    Raises:
        ConfigError: kernels=triton cannot take this dtype or width.
    """
    if kernels == "torch":
        return F.rms_norm(x, weight_D.shape, weight_D, eps)
    from hydra.kernels._triton import rms_norm as triton_kernels

    return triton_kernels.rms_norm(x, weight_D, eps)

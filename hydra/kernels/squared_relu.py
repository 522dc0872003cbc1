"""Squared ReLU (Primer, So et al., arXiv 2109.08668, section 4.1)."""

import torch.nn.functional as F
from torch import Tensor


def squared_relu(x: Tensor, kernels: str = "torch") -> Tensor:
    """max(x, 0)**2.

    Args:
        x: (..., F), any floating dtype; with kernels=triton float32, float16 or bfloat16.
        kernels: one of hydra.kernels.dispatch.KERNELS.
    Returns:
        In the shape and dtype of x.
    Raises:
        ConfigError: kernels=triton cannot take this dtype.
    """
    if kernels == "torch":
        return F.relu(x).square()
    from hydra.kernels._triton import squared_relu as triton_kernels

    return triton_kernels.squared_relu(x)

"""The gate of SwiGLU (Shazeer, arXiv 2002.05202, eq. 6)."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor, kernels: str = "torch") -> Tensor:
    """silu(gate) * up, where silu(x) = x / (1 + exp(-x)).

    Args:
        gate, up: (..., F), of one shape and dtype; with kernels=triton float32, float16 or bfloat16.
        kernels: one of hydra.kernels.dispatch.KERNELS.
    Returns:
        In their shape and dtype.
    Raises:
        ConfigError: kernels=triton cannot take this dtype.
    """
    if kernels == "torch":
        return F.silu(gate) * up
    from hydra.kernels._triton import swiglu as triton_kernels

    return triton_kernels.swiglu(gate, up)

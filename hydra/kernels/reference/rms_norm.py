"""Root-mean-square norm, in float64 and step by step. D width of a row."""

from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x**2) + eps) * weight over the last axis, in float64; gradients by autograd."""
    x, weight_D = x.double(), weight_D.double()
    mean_square = x.square().sum(dim=-1, keepdim=True) / x.shape[-1]
    return x / (mean_square + eps).sqrt() * weight_D

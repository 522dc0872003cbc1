"""Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467, eq. 4)."""

from torch import Tensor, nn

from hydra.kernels.rms_norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """torch's own, with a forward that torch.compile takes for a region: it passes over modules inside torch."""

    def __init__(self, width: int, eps: float, kernels: str = "torch") -> None:
        super().__init__(width, eps=eps)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """x / sqrt(mean(x**2) + eps) * weight over the last axis, in the dtype of x."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps, self.kernels)

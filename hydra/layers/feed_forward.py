"""Feed-forward networks: SwiGLU and squared ReLU. All linears without bias.

B batch, T tokens, D model width, F feed-forward width.
"""

from torch import Tensor, nn

from hydra.kernels.squared_relu import squared_relu
from hydra.kernels.swiglu import swiglu


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202, eq. 6); 3DF parameters."""

    def __init__(self, d_model: int, d_feed_forward: int, kernels: str = "torch") -> None:
        super().__init__()
        self.kernels = kernels
        self.gate = nn.Linear(d_model, d_feed_forward, bias=False)
        self.up = nn.Linear(d_model, d_feed_forward, bias=False)
        self.down = nn.Linear(d_feed_forward, d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D), each token by itself."""
        return self.down(swiglu(self.gate(x_BTD), self.up(x_BTD), self.kernels))

    def flops(self, n_tokens: int) -> int:
        """Forward floating-point operations of n_tokens tokens, 2 per multiply-add of the matrices."""
        return 2 * 3 * self.up.in_features * self.up.out_features * n_tokens


class SquaredReLU(nn.Module):
    """down(relu(up(x))**2) (Primer, So et al., arXiv 2109.08668, section 4.1); 2DF parameters."""

    def __init__(self, d_model: int, d_feed_forward: int, kernels: str = "torch") -> None:
        super().__init__()
        self.kernels = kernels
        self.up = nn.Linear(d_model, d_feed_forward, bias=False)
        self.down = nn.Linear(d_feed_forward, d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D), each token by itself."""
        return self.down(squared_relu(self.up(x_BTD), self.kernels))

    def flops(self, n_tokens: int) -> int:
        """Forward floating-point operations of n_tokens tokens, 2 per multiply-add of the matrices."""
        return 2 * 2 * self.up.in_features * self.up.out_features * n_tokens

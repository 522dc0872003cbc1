"""One block of the model: pre-norm attention, then pre-norm feed-forward, each added to the residual stream.

B batch, T tokens, D model width.
"""

from torch import Tensor, nn

from hydra.attention import PlannedLayer
from hydra.attention.base import AttentionCache
from hydra.attention.masks import AttentionContext
from hydra.attention.registry import load_layer_class
from hydra.layers.feed_forward import SquaredReLU, SwiGLU
from hydra.layers.norms import RMSNorm
from hydra.model.framework.spec import ModelSpec

FEED_FORWARD_CLASSES: dict[str, type[SwiGLU] | type[SquaredReLU]] = {"squared_relu": SquaredReLU, "swiglu": SwiGLU}


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); `kernels` as Execution names them."""

    def __init__(self, spec: ModelSpec, layer: PlannedLayer, kernels: str = "torch") -> None:
        super().__init__()
        self.attention_norm = RMSNorm(spec.d_model, spec.norm_eps, kernels)
        self.attention = load_layer_class(layer.name)(layer.spec)
        self.attention.use_kernels(kernels)
        self.feed_forward_norm = RMSNorm(spec.d_model, spec.norm_eps, kernels)
        self.feed_forward = FEED_FORWARD_CLASSES[spec.feed_forward](spec.d_model, spec.d_feed_forward, kernels)

    def forward(self, x_BTD: Tensor, context: AttentionContext, cache: AttentionCache | None) -> Tensor:
        """Map (B, T, D) to (B, T, D); context and cache are those of this layer."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), context, cache=cache)
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))

    def flops(self, n_tokens: int) -> int:
        """Forward floating-point operations of one sequence, causal pairs; matrices and convolutions only."""
        return self.attention.flops(n_tokens) + self.feed_forward.flops(n_tokens)

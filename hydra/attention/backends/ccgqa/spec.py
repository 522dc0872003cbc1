"""Options of compressed convolutional attention (arXiv 2510.04476). No torch in this file."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hydra.attention.spec import AttentionSpec, check_divides, check_float, check_int, largest_divisor
from hydra.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CCGQASpec(AttentionSpec):
    """Attention in a compressed space: fewer heads than the multi-head reference, each of the reference's width.

    Query compression C1 = n_heads / n_query_heads, key/value compression C2 = n_heads / n_kv_heads.
    n_query_heads == n_kv_heads is CCA, otherwise CCGQA.
    """

    n_query_heads: int
    """Query heads N of the compressed space; lq = n_query_heads * head_width."""
    n_kv_heads: int
    """Key/value heads K; must divide n_query_heads; lk = n_kv_heads * head_width must be even for the value shift."""
    conv_kernel_0: int
    """Taps of the depthwise convolution. The paper does not publish it; the released models use 2."""
    conv_kernel_1: int
    """Taps of the convolution that mixes the channels of each head. The released models use 2."""
    rope_base: float
    """Theta of the rotary embedding."""
    rotary_fraction: float
    """Which part of each head's channels is rotated, from the first on; above 0, at most 1."""

    @classmethod
    def default_options(cls, d_model: int, n_heads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """CCGQA-2x/8x, the paper's headline shape, with the kernel sizes of the released models."""
        n_query_heads = options.get("n_query_heads", max(1, n_heads // 2))
        check_int("n_query_heads", n_query_heads)
        return {
            "n_query_heads": n_query_heads,
            "n_kv_heads": largest_divisor(n_query_heads, n_heads // 8),
            "conv_kernel_0": 2,
            "conv_kernel_1": 2,
            "rope_base": 10000.0,
            "rotary_fraction": 1.0,
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_query_heads", "n_kv_heads", "conv_kernel_0", "conv_kernel_1"):
            check_int(name, getattr(self, name))
        check_divides("n_kv_heads", self.n_kv_heads, "n_query_heads", self.n_query_heads)
        check_float("rope_base", self.rope_base, above=1.0)
        check_float("rotary_fraction", self.rotary_fraction, above=0.0, up_to=1.0)
        if self.key_width % 2:
            raise ConfigError(
                "n_kv_heads * d_model / n_heads must be even for the value shift, but got "
                f"n_kv_heads={self.n_kv_heads}, d_model={self.d_model}, n_heads={self.n_heads}; use an even head width"
            )
        if not (self.head_width * self.rotary_fraction / 2).is_integer():
            raise ConfigError(
                "rotary_fraction must leave an even number of rotated channels, but got "
                f"rotary_fraction={self.rotary_fraction} with d_model / n_heads = {self.head_width}; "
                "change rotary_fraction or the head width"
            )

    @property
    def query_width(self) -> int:
        """Width lq of all query heads."""
        return self.n_query_heads * self.head_width

    @property
    def key_width(self) -> int:
        """Width lk of all key heads, and of all value heads."""
        return self.n_kv_heads * self.head_width

    @property
    def rotary_width(self) -> int:
        """Rotated channels of each head."""
        return int(self.head_width * self.rotary_fraction)

    @property
    def n_past_columns(self) -> int:
        """How many tokens before its own a token's convolutions reach: (k0 - 1) + (k1 - 1)."""
        return self.conv_kernel_0 + self.conv_kernel_1 - 2

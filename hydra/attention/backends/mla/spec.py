"""Options of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1). No torch in this file."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hydra.attention.spec import AttentionSpec, check_float, check_int
from hydra.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLASpec(AttentionSpec):
    """n_heads heads whose keys and values are projected up from one latent, and one rotated key that all of them share.

    The head width d_model / n_heads of the multi-head reference only sets the defaults.
    """

    kv_latent_width: int
    """Width L of the latent of keys and values (d_c of the paper)."""
    q_latent_width: int
    """Width of the latent of queries (d_c' of the paper); 0: queries are projected from the input, without a norm."""
    nope_width: int
    """Channels C of a head's query and key that carry no position (d_h of the paper)."""
    rotary_width: int
    """Channels R of a head's query, and of the shared key, that are rotated (d_h^R of the paper); even, 0 for none."""
    value_width: int
    """Width U of a head's value (d_h of the paper)."""
    rope_base: float
    """Theta of the rotary embedding."""

    @classmethod
    def default_options(cls, d_model: int, n_heads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """The proportions of DeepSeek-V2-Lite: for a head width of 128 a latent of 512, 64 rotated channels."""
        head_width = d_model // n_heads
        return {
            "kv_latent_width": min(4 * head_width, d_model),
            "q_latent_width": 0,
            "nope_width": head_width,
            "rotary_width": 2 * max(1, head_width // 4),
            "value_width": head_width,
            "rope_base": 10000.0,
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kv_latent_width", "nope_width", "value_width"):
            check_int(name, getattr(self, name))
        for name in ("q_latent_width", "rotary_width"):
            check_int(name, getattr(self, name), minimum=0)
        check_float("rope_base", self.rope_base, above=1.0)
        if self.rotary_width % 2:
            raise ConfigError(
                f"rotary_width must be even, but got rotary_width={self.rotary_width}; try {self.rotary_width + 1}"
            )

    @property
    def score_width(self) -> int:
        """Channels of a head that are scored, C + R."""
        return self.nope_width + self.rotary_width

    @property
    def cache_width(self) -> int:
        """Elements that a cache keeps of a token, L + R."""
        return self.kv_latent_width + self.rotary_width

    @property
    def n_expansion_weights(self) -> int:
        """Weights of the projection from the latent to the keys and values of all heads."""
        return self.kv_latent_width * self.n_heads * (self.nope_width + self.value_width)

    @property
    def n_weights(self) -> int:
        """Weights of all matrices."""
        query_width = self.n_heads * self.score_width
        if self.q_latent_width:
            n_query = self.q_latent_width * (self.d_model + query_width)
        else:
            n_query = self.d_model * query_width
        n_output = self.n_heads * self.value_width * self.d_model
        return n_query + self.d_model * self.cache_width + self.n_expansion_weights + n_output

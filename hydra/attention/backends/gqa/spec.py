"""Options of grouped-query attention (Ainslie et al., arXiv 2305.13245). No torch in this file."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hydra.attention.spec import AttentionSpec, check_divides, check_float, check_int, largest_divisor
from hydra.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GQASpec(AttentionSpec):
    """n_heads query heads that share n_kv_heads key/value heads of the same width."""

    n_kv_heads: int
    """Key/value heads K; must divide n_heads. n_heads is multi-head, 1 is multi-query attention."""
    rope_base: float
    """Theta of the rotary embedding."""
    qk_norm: bool
    """Whether each head's query and key get norm sqrt(H) before rotation (Henry et al., arXiv 2010.04245)."""
    window: int
    """How many tokens a token sees, its own included; 0: all before it."""

    @classmethod
    def default_options(cls, d_model: int, n_heads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """A quarter of the heads (rounded down to a divisor), the rotary base of the paper, and no window."""
        return {
            "n_kv_heads": largest_divisor(n_heads, n_heads // 4),
            "rope_base": 10000.0,
            "qk_norm": False,
            "window": 0,
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("n_kv_heads", self.n_kv_heads)
        check_divides("n_kv_heads", self.n_kv_heads, "n_heads", self.n_heads)
        check_float("rope_base", self.rope_base, above=1.0)
        check_int("window", self.window, minimum=0)
        if type(self.qk_norm) is not bool:
            raise ConfigError(f"qk_norm must be True or False, but got qk_norm={self.qk_norm!r}; correct qk_norm")
        if self.head_width % 2:
            raise ConfigError(
                f"d_model / n_heads must be even for the rotary embedding, but got d_model={self.d_model} and "
                f"n_heads={self.n_heads}; change one of them"
            )

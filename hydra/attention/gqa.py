"""Public names of the gqa backend."""

from hydra.attention.backends.gqa.attention import GroupedQueryAttention
from hydra.attention.backends.gqa.conversion import convert_to_grouped, mean_pool_heads
from hydra.attention.backends.gqa.spec import GQASpec

__all__ = ["GQASpec", "GroupedQueryAttention", "convert_to_grouped", "mean_pool_heads"]

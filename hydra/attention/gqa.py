"""Public names of the gqa backend."""

from hydra.attention.backends.gqa.attention import GroupedQueryAttention
from hydra.attention.backends.gqa.spec import GQASpec

__all__ = ["GQASpec", "GroupedQueryAttention"]

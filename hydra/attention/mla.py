"""Public names of the mla backend."""

from hydra.attention.backends.mla.attention import LatentAttention
from hydra.attention.backends.mla.spec import MLASpec

__all__ = ["LatentAttention", "MLASpec"]

"""Public names of the lightning backend."""

from hydra.attention.backends.lightning.attention import LightningAttention
from hydra.attention.backends.lightning.spec import LightningSpec

__all__ = ["LightningAttention", "LightningSpec"]

"""Public names of the ccgqa backend."""

from hydra.attention.backends.ccgqa.attention import CompressedConvolutionalAttention
from hydra.attention.backends.ccgqa.spec import CCGQASpec

__all__ = ["CCGQASpec", "CompressedConvolutionalAttention"]

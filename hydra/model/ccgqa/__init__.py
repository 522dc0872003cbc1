"""Old import path of the ccgqa attention; use hydra.attention.ccgqa."""

import warnings

from hydra.attention.ccgqa import CCGQASpec, CompressedConvolutionalAttention

__all__ = ["CCGQASpec", "CompressedConvolutionalAttention"]

warnings.warn("hydra.model.ccgqa has moved; import from hydra.attention.ccgqa", DeprecationWarning, stacklevel=2)

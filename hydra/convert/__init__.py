"""Weights from and to Hugging Face transformers, as config dictionaries and state dicts; transformers is not needed."""

from hydra.convert.attention import load_attention, save_attention
from hydra.convert.models import load_transformers, save_transformers

__all__ = ["load_attention", "load_transformers", "save_attention", "save_transformers"]

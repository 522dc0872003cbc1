"""Tiny models and layers for tests, with parameters that leave nothing at a special value."""

from typing import Any

import torch
from torch import nn

from hydra.attention import build_attention
from hydra.attention.base import AttentionBackend
from hydra.model.framework import HydraModel, ModelSpec, build_model


def tiny_model_spec(**changes: Any) -> ModelSpec:
    """A model of two layers, width 32, vocabulary 61; `changes` are fields of ModelSpec."""
    fields: dict[str, Any] = {
        "vocab_size": 61,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "attention": "gqa",
        "feed_forward": "swiglu",
        "d_feed_forward": 48,
        "tie_embeddings": True,
        "norm_eps": 1e-5,
    }
    return ModelSpec(**{**fields, **changes})


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Draw every parameter from a normal distribution: matrices keep magnitudes, no bias or temperature stays zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        deviation = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * deviation
        parameter.copy_(values)


def build_random_layer(
    name: str, d_model: int, n_heads: int, dtype: torch.dtype = torch.float64, **options: Any
) -> AttentionBackend:
    """An attention layer with random parameters; the global random state stays as it was."""
    with torch.device("meta"):
        layer = build_attention(name, d_model=d_model, n_heads=n_heads, **options)
    layer = layer.to(dtype).to_empty(device="cpu")
    randomise(layer)
    return layer


def build_random_model(dtype: torch.dtype = torch.float64, **changes: Any) -> HydraModel:
    """A tiny model with random parameters, whose outputs depend visibly on every token."""
    model = build_model(tiny_model_spec(**changes), dtype=dtype)
    randomise(model)
    return model


def random_activations(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers of their own generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def document_ids(*lengths: int) -> torch.Tensor:
    """Ids 0, 1, ... of one row that holds documents of these lengths, (1, T)."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]

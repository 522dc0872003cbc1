"""Attention layers behind one interface: pick a backend by name, check its options, build it.

Importing this package does not import torch, so that options can be checked before anything slow happens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.attention.code import record_code
from hydra.attention.plan import (
    PlannedLayer,
    build_spec,
    parse_plan,
    plan_layers,
    record_plan_code,
    refuse_missing_records,
)
from hydra.attention.registry import available_backends, load_layer_class

if TYPE_CHECKING:
    from hydra.attention.base import AttentionBackend

__all__ = [
    "PlannedLayer",
    "available_backends",
    "build_attention",
    "check_options",
    "parse_plan",
    "plan_layers",
    "record_plan_code",
    "refuse_missing_records",
]


def check_options(name: str, d_model: int, n_heads: int, options: Mapping[str, Any]) -> None:
    """Check without torch that build_attention would take this; raises ConfigError naming the field if it would not."""
    code = record_code([name], {}, Path())
    build_spec(name, code, d_model=d_model, n_heads=n_heads, layer_index=0, n_layers=1, options=options)


def build_attention(
    name: str,
    *,
    d_model: int,
    n_heads: int,
    layer_index: int = 0,
    n_layers: int = 1,
    kernels: str = "torch",
    **options: Any,
) -> "AttentionBackend":
    """Build the attention layer `name` on torch's current default device, in its default dtype.

    Args:
        name: one of available_backends(), or a class of your own, path/to/file.py:Class.
        d_model: width of the residual stream.
        n_heads: head count of the multi-head reference, which fixes the head width d_model / n_heads.
        layer_index: which layer of the model this is, from 0.
        n_layers: how many layers the model has.
        kernels: what serves the layer's operators, one of hydra.kernels.dispatch.KERNELS.
        options: fields of the backend's spec, e.g. n_kv_heads=2; what is left out takes the backend's default.
    Raises:
        ConfigError: unknown backend or option (naming the closest known one), or a value that cannot be.
    """
    spec = build_spec(
        name,
        record_code([name], {}, Path()),
        d_model=d_model,
        n_heads=n_heads,
        layer_index=layer_index,
        n_layers=n_layers,
        options=options,
    )
    layer = load_layer_class(name)(spec)
    layer.use_kernels(kernels)
    return layer

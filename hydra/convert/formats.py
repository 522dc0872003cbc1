"""AttentionFormat: what a converter of one kind of attention consists of."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from hydra.attention.spec import AttentionSpec
from hydra.convert.tensors import TensorPair


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """What build_attention wants to know, but for the layer's place in the model."""

    d_model: int
    n_heads: int
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class AttentionFormat:
    """The attention of one model_type of transformers, and the backend that computes the same."""

    model_type: str
    backend: str
    read_shape: Callable[[Mapping[str, Any], int], LayerShape]
    """From a config and the index of a layer; ConfigError names a field that cannot be computed."""
    write_config: Callable[[Any], dict[str, Any]]
    """From the backend's spec: the fields of a config that this attention depends on; ConfigError names an option that
    the model_type does not have."""
    pair_tensors: Callable[[Any, Mapping[str, Any]], list[TensorPair]]
    """From the backend's spec and the config: every tensor."""


def write_common_config(model_type: str, spec: AttentionSpec) -> dict[str, Any]:
    """Fields that the configs of all model types have."""
    return {
        "model_type": model_type,
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.n_layers,
        "attention_dropout": 0.0,
    }

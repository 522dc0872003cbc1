"""Llama's attention and `gqa`: the same tensors under the same names, rotated by halves in both."""

from collections.abc import Mapping
from typing import Any

from hydra.attention.backends.gqa.spec import GQASpec
from hydra.convert.config import (
    check_fixed,
    check_heads_fill_width,
    read_full_rope_base,
    read_head_width,
    read_optional,
    read_size,
)
from hydra.convert.formats import AttentionFormat, LayerShape, write_common_config
from hydra.convert.tensors import TensorPair, same_tensor
from hydra.errors import ConfigError


def read_shape(config: Mapping[str, Any], layer_index: int) -> LayerShape:
    """See AttentionFormat.read_shape."""
    check_fixed(config, attention_bias=False, attention_dropout=0.0)
    n_heads = read_size(config, "num_attention_heads")
    check_heads_fill_width(config, read_head_width(config), n_heads)
    options = {
        "n_kv_heads": read_optional(config, "num_key_value_heads", n_heads),
        "rope_base": read_full_rope_base(config),
        "qk_norm": False,
        "window": 0,
    }
    return LayerShape(read_size(config, "hidden_size"), n_heads, options)


def write_config(spec: GQASpec) -> dict[str, Any]:
    """See AttentionFormat.write_config."""
    for name, value in (("qk_norm", False), ("window", 0)):
        if getattr(spec, name) != value:
            raise ConfigError(
                f"{name} must be {value!r} for a Llama, but got {name}={getattr(spec, name)!r}; "
                "its attention has no such option"
            )
    return {
        **write_common_config("llama", spec),
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_width,
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_base},
    }


def pair_tensors(spec: GQASpec, config: Mapping[str, Any]) -> list[TensorPair]:
    """See AttentionFormat.pair_tensors."""
    d_model, kv_width = spec.d_model, spec.n_kv_heads * spec.head_width
    return [
        same_tensor("q_proj.weight", "q_proj.weight", d_model, d_model),
        same_tensor("k_proj.weight", "k_proj.weight", kv_width, d_model),
        same_tensor("v_proj.weight", "v_proj.weight", kv_width, d_model),
        same_tensor("o_proj.weight", "o_proj.weight", d_model, d_model),
    ]


LLAMA = AttentionFormat("llama", "gqa", read_shape, write_config, pair_tensors)

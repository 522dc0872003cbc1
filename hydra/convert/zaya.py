"""ZAYA's attention and `ccgqa` (transformers' models/zaya).

Two things differ. Their keys are multiplied with the raw `temp`, ours with its exponential (as in the paper): we load
the logarithm, taken in float64. And their norms are floored at the machine epsilon of the dtype, ours at 1e-12: that
shows only for a head whose query or key is shorter than that, 1e-7 in float32.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hydra.attention.backends.ccgqa.spec import CCGQASpec
from hydra.convert.config import check_fixed, read_field, read_layer_type, read_rope, read_size
from hydra.convert.formats import AttentionFormat, LayerShape, write_common_config
from hydra.convert.tensors import TensorPair, changed_tensor, same_tensor
from hydra.errors import CheckpointError, ConfigError

LAYER_TYPE = "hybrid"


def read_shape(config: Mapping[str, Any], layer_index: int) -> LayerShape:
    """See AttentionFormat.read_shape. The heads of the multi-head reference are hidden_size / head_dim."""
    read_layer_type(config, layer_index, LAYER_TYPE)
    check_fixed(config, attention_bias=False, attention_dropout=0.0)
    d_model, head_width = read_size(config, "hidden_size"), read_size(config, "head_dim")
    if d_model % head_width:
        raise ConfigError(
            f"head_dim must divide hidden_size, but got head_dim={head_width} and hidden_size={d_model}; "
            "HYDRA's layer has heads of the width that a whole number of them fills"
        )
    rope = read_rope(config, LAYER_TYPE)
    options = {
        "n_query_heads": read_size(config, "num_attention_heads"),
        "n_kv_heads": read_field(config, "num_key_value_heads"),
        "conv_kernel_0": read_field(config, "cca_time0"),
        "conv_kernel_1": read_field(config, "cca_time1"),
        "rope_base": rope.base,
        "rotary_fraction": rope.fraction,
    }
    return LayerShape(d_model, d_model // head_width, options)


def write_config(spec: CCGQASpec) -> dict[str, Any]:
    """See AttentionFormat.write_config."""
    rope = {"rope_type": "default", "rope_theta": spec.rope_base, "partial_rotary_factor": spec.rotary_fraction}
    return {
        **write_common_config("zaya", spec),
        "num_attention_heads": spec.n_query_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_width,
        "attention_bias": False,
        "cca_time0": spec.conv_kernel_0,
        "cca_time1": spec.conv_kernel_1,
        "layer_types": [LAYER_TYPE] * spec.n_layers,
        "rope_parameters": {LAYER_TYPE: rope},
    }


def pair_tensors(spec: CCGQASpec, config: Mapping[str, Any]) -> list[TensorPair]:
    """See AttentionFormat.pair_tensors."""
    d_model, query_width, key_width = spec.d_model, spec.query_width, spec.key_width
    n_channels = query_width + key_width
    conv0, conv1 = "qkv_proj.conv_qk_depthwise", "qkv_proj.conv_qk_grouped"
    return [
        same_tensor("qkv_proj.q_proj.weight", "q_proj.weight", query_width, d_model),
        same_tensor("qkv_proj.k_proj.weight", "k_proj.weight", key_width, d_model),
        same_tensor("qkv_proj.v_proj_current.weight", "v_proj.weight", key_width // 2, d_model),
        same_tensor("qkv_proj.v_proj_delayed.weight", "v_previous_proj.weight", key_width // 2, d_model),
        same_tensor(f"{conv0}.weight", "conv0.weight", n_channels, 1, spec.conv_kernel_0),
        same_tensor(f"{conv0}.bias", "conv0.bias", n_channels),
        same_tensor(f"{conv1}.weight", "conv1.weight", n_channels, spec.head_width, spec.conv_kernel_1),
        same_tensor(f"{conv1}.bias", "conv1.bias", n_channels),
        changed_tensor("qk_norm.temp", "temp", spec.n_kv_heads, split=take_logarithm, join=take_exponential),
        same_tensor("o_proj.weight", "o_proj.weight", d_model, query_width),
    ]


def take_logarithm(temp_K: Tensor) -> Tensor:
    """log(temp), in the dtype of temp.

    Where temp lies in [1/e, e] rounding keeps all values apart, and `take_exponential` gives temp back to the bit;
    elsewhere within |log(temp)| + 1 units in the last place. (Logarithms near 0 are finer than what temp can hold:
    ours, saved and loaded, changes by up to half of temp's last place.)

    Raises:
        CheckpointError: a value that is not above 0 or not finite.
    """
    for head, value in enumerate(temp_K.tolist()):
        if not 0 < value < float("inf"):
            raise CheckpointError(
                f"qk_norm.temp must be finite and above 0 in every head, but got {value} in head {head}; load trained "
                "weights, or set temp to ones. HYDRA's layer multiplies keys with exp(temp), which is never 0; an "
                "untrained module of transformers holds zeros here, and all its keys are zero"
            )
    return temp_K.double().log().to(temp_K.dtype)


def take_exponential(temp_K: Tensor) -> Tensor:
    """exp(temp), in the dtype of temp."""
    return temp_K.to(torch.float64).exp().to(temp_K.dtype)


ZAYA = AttentionFormat("zaya", "ccgqa", read_shape, write_config, pair_tensors)

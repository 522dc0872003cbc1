"""MiniMax's lightning layers and `lightning` (transformers' models/minimax).

Their one projection makes query, key and value of the first head, then those of the second, and so on. Decays are not
learned: ours are computed from the layer's place in the model. Theirs stand among the weights as well, for blocks of
block_size tokens; they are checked when loaded, and written for blocks of 256.

D model width, N heads, H head width, P tokens of a block.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hydra.attention.backends.lightning.spec import LightningSpec
from hydra.convert.config import (
    check_fixed,
    check_heads_fill_width,
    read_head_width,
    read_layer_type,
    read_optional,
    read_size,
)
from hydra.convert.formats import AttentionFormat, LayerShape, write_common_config
from hydra.convert.tensors import TensorPair, derived_tensor, same_tensor
from hydra.errors import ConfigError

LAYER_TYPE = "linear_attention"
BLOCK_SIZE = 256
"""That of the released models, and transformers' default. It changes how their module computes, not what."""


def read_shape(config: Mapping[str, Any], layer_index: int) -> LayerShape:
    """See AttentionFormat.read_shape."""
    read_layer_type(config, layer_index, LAYER_TYPE)
    check_fixed(config, hidden_act="silu")
    n_heads = read_size(config, "num_attention_heads")
    check_heads_fill_width(config, read_head_width(config), n_heads)
    return LayerShape(read_size(config, "hidden_size"), n_heads, {"gate_rank": 0})


def write_config(spec: LightningSpec) -> dict[str, Any]:
    """See AttentionFormat.write_config."""
    if spec.gate_rank != 0:
        raise ConfigError(
            f"gate_rank must be 0 for a MiniMax, but got gate_rank={spec.gate_rank}; its output gate is one matrix"
        )
    return {
        **write_common_config("minimax", spec),
        "num_attention_heads": spec.n_heads,
        "head_dim": spec.head_width,
        "hidden_act": "silu",
        "layer_types": [LAYER_TYPE] * spec.n_layers,
        "block_size": BLOCK_SIZE,
    }


def pair_tensors(spec: LightningSpec, config: Mapping[str, Any]) -> list[TensorPair]:
    """See AttentionFormat.pair_tensors."""
    d_model, heads = spec.d_model, (spec.n_heads, 3, spec.head_width)

    def split(weight_YD: Tensor) -> Sequence[Tensor]:
        return [weight_NHD.flatten(0, 1) for weight_NHD in weight_YD.unflatten(0, heads).unbind(1)]

    def join(weights: Sequence[Tensor]) -> Tensor:
        return torch.stack([weight.unflatten(0, (spec.n_heads, -1)) for weight in weights], dim=1).flatten(0, 2)

    ours = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    return [
        TensorPair("qkv_proj.weight", (3 * d_model, d_model), ours, split, join),
        same_tensor("norm.weight", "norm.weight", d_model),
        same_tensor("output_gate.weight", "gate_proj.weight", d_model, d_model),
        same_tensor("out_proj.weight", "o_proj.weight", d_model, d_model),
        *pair_decays(spec, read_optional(config, "block_size", BLOCK_SIZE)),
    ]


def pair_decays(spec: LightningSpec, block_size: int) -> list[TensorPair]:
    """What their module keeps of its decays: slope, and the decays within and between blocks.

    Slopes may differ by one and a half roundings, which in bfloat16 still tells the layers of an 80-layer model apart;
    the others are exponentials of up to block_size slopes, and may differ by what that makes of a rounding.
    """
    base = 1 / 2 ** (8 / spec.n_heads)
    slope_N11 = (base ** (torch.arange(spec.n_heads) + 1) * spec.layer_factor)[:, None, None]
    places_P1 = torch.arange(1, block_size + 1)[:, None]
    apart_PP = places_P1 - places_P1.T
    within_NPP = torch.exp(-slope_N11 * apart_PP.clamp(min=0)).masked_fill(apart_PP < 0, 0.0)
    return [
        derived_tensor("slope_rate", slope_N11, relative=1.5),
        derived_tensor("query_decay", torch.exp(-slope_N11 * places_P1), absolute=4),
        derived_tensor("key_decay", torch.exp(-slope_N11 * (block_size - places_P1)), absolute=4),
        derived_tensor("diagonal_decay", within_NPP[None], absolute=4),
    ]


MINIMAX = AttentionFormat("minimax", "lightning", read_shape, write_config, pair_tensors)

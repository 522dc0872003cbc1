"""DeepSeek-V3's attention and `mla` (transformers' models/deepseek_v3).

With `rope_interleave` (the default, and what released weights are made for) they rotate neighbouring channels, (0, 1),
(2, 3) and so on; we rotate channel r with channel R / 2 + r. So the rows of weights that make rotated channels change
places: the even ones come first, then the odd ones. Queries and the shared key change alike, so scores stay.

D model width, N heads, L width of the latent, C and R channels of a head's score without and with rotation, U value
width, X input width of a projection.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hydra.attention.backends.mla.spec import MLASpec
from hydra.convert.config import check_fixed, read_field, read_full_rope_base, read_optional, read_size
from hydra.convert.formats import AttentionFormat, LayerShape, write_common_config
from hydra.convert.tensors import TensorPair, changed_tensor, same_tensor
from hydra.errors import ConfigError


def read_shape(config: Mapping[str, Any], layer_index: int) -> LayerShape:
    """See AttentionFormat.read_shape."""
    n_heads, rotary_width = read_size(config, "num_attention_heads"), read_field(config, "qk_rope_head_dim")
    check_fixed(config, attention_bias=False, attention_dropout=0.0, num_key_value_heads=n_heads, head_dim=rotary_width)
    check_rotates("qk_rope_head_dim", rotary_width)
    options = {
        "kv_latent_width": read_field(config, "kv_lora_rank"),
        "q_latent_width": read_optional(config, "q_lora_rank", 0),
        "nope_width": read_field(config, "qk_nope_head_dim"),
        "rotary_width": rotary_width,
        "value_width": read_field(config, "v_head_dim"),
        "rope_base": read_full_rope_base(config),
    }
    return LayerShape(read_size(config, "hidden_size"), n_heads, options)


def write_config(spec: MLASpec) -> dict[str, Any]:
    """See AttentionFormat.write_config. Always for neighbouring channels, as released weights are."""
    check_rotates("rotary_width", spec.rotary_width)
    return {
        **write_common_config("deepseek_v3", spec),
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_heads,
        "attention_bias": False,
        "kv_lora_rank": spec.kv_latent_width,
        "q_lora_rank": spec.q_latent_width or None,
        "qk_nope_head_dim": spec.nope_width,
        "qk_rope_head_dim": spec.rotary_width,
        "v_head_dim": spec.value_width,
        "rope_interleave": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_base},
    }


def check_rotates(name: str, rotary_width: int) -> None:
    """Raise ConfigError for a layer without rotated channels, which their module cannot be."""
    if rotary_width == 0:
        raise ConfigError(f"{name} must be at least 2, but got {name}=0; transformers' module rotates some channels")


def pair_tensors(spec: MLASpec, config: Mapping[str, Any]) -> list[TensorPair]:
    """See AttentionFormat.pair_tensors."""
    d_model, n_heads, latent_width, rotary_width = spec.d_model, spec.n_heads, spec.kv_latent_width, spec.rotary_width
    query_width, value_width = n_heads * spec.score_width, n_heads * spec.value_width
    is_interleaved = read_optional(config, "rope_interleave", True)

    def rotated(theirs: str, ours: str, n_groups: int, n_inputs: int, n_rows: int) -> TensorPair:
        """A projection whose rows stand in groups, the last R rows of each rotated."""
        if not is_interleaved:
            return same_tensor(theirs, ours, n_rows, n_inputs)
        split, join = (
            reorder_rotated_rows(n_groups, rotary_width, reorder) for reorder in (halves_of_pairs, pairs_of_halves)
        )
        return changed_tensor(theirs, ours, n_rows, n_inputs, split=split, join=join)

    if spec.q_latent_width:
        queries = [
            same_tensor("q_a_proj.weight", "q_down_proj.weight", spec.q_latent_width, d_model),
            same_tensor("q_a_layernorm.weight", "q_norm.weight", spec.q_latent_width),
            rotated("q_b_proj.weight", "q_up_proj.weight", n_heads, spec.q_latent_width, query_width),
        ]
    else:
        queries = [rotated("q_proj.weight", "q_proj.weight", n_heads, d_model, query_width)]
    return [
        *queries,
        rotated("kv_a_proj_with_mqa.weight", "kv_down_proj.weight", 1, d_model, latent_width + rotary_width),
        same_tensor("kv_a_layernorm.weight", "kv_norm.weight", latent_width),
        same_tensor(
            "kv_b_proj.weight", "kv_up_proj.weight", n_heads * (spec.nope_width + spec.value_width), latent_width
        ),
        same_tensor("o_proj.weight", "o_proj.weight", d_model, value_width),
    ]


def reorder_rotated_rows(
    n_groups: int, rotary_width: int, reorder: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """What applies `reorder`, of (groups, R, X), to the last R rows of each group of a weight (rows, X)."""

    def apply(weight_YX: Tensor) -> Tensor:
        groups = weight_YX.unflatten(0, (n_groups, -1))
        n_still = groups.shape[1] - rotary_width
        return torch.cat([groups[:, :n_still], reorder(groups[:, n_still:])], dim=1).flatten(0, 1)

    return apply


def halves_of_pairs(rows_NRX: Tensor) -> Tensor:
    """Rows 0, 2, 4, ... and then 1, 3, 5, ... of each group."""
    return torch.cat([rows_NRX[:, 0::2], rows_NRX[:, 1::2]], dim=1)


def pairs_of_halves(rows_NRX: Tensor) -> Tensor:
    """The inverse of halves_of_pairs."""
    return torch.stack(rows_NRX.chunk(2, dim=1), dim=2).flatten(1, 2)


DEEPSEEK_V3 = AttentionFormat("deepseek_v3", "mla", read_shape, write_config, pair_tensors)

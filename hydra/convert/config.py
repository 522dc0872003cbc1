"""Reading the config dictionaries of transformers, strictly: what is missing or cannot be computed is refused by name.

Fields that their module of this model_type does not read are passed over: they change nothing there either.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hydra.attention.spec import check_int
from hydra.errors import ConfigError

DEFAULT_ROPE_BASE = 10000.0
"""What transformers takes where an old config names none."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding of a layer: base, and which part of a head's channels is rotated."""

    base: float
    fraction: float


def read_field(config: Mapping[str, Any], name: str) -> Any:
    """The value of a field that must be there."""
    if config.get(name) is None:
        raise ConfigError(f"{name} must be in the config, but got none; pass the whole config of the model")
    return config[name]


def read_size(config: Mapping[str, Any], name: str) -> int:
    """The value of a field that must be there and be a whole number of at least 1."""
    value = read_field(config, name)
    check_int(name, value)
    return int(value)


def read_optional(config: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The value of a field that transformers fills in where it is absent or null."""
    return otherwise if config.get(name) is None else config[name]


def check_fixed(config: Mapping[str, Any], **expected: Any) -> None:
    """Raise ConfigError for a field that is there and has another value than the only one that can be computed."""
    for name, value in expected.items():
        if read_optional(config, name, value) != value:
            raise ConfigError(
                f"{name} must be {value!r} to be loaded, but got {name}={config[name]!r}; HYDRA's layer computes "
                "nothing else"
            )


def check_model_type(config: Mapping[str, Any], known: list[str], what: str) -> str:
    """The model_type, which must be a known one."""
    model_type = read_field(config, "model_type")
    if model_type not in known:
        raise ConfigError(
            f"model_type must be one of {', '.join(known)} for {what}, but got model_type={model_type!r}; "
            "other architectures compute something else"
        )
    return str(model_type)


def check_heads_fill_width(config: Mapping[str, Any], head_width: int, n_heads: int) -> None:
    """Raise ConfigError unless all heads together are as wide as the model."""
    d_model = read_size(config, "hidden_size")
    if head_width * n_heads != d_model:
        raise ConfigError(
            "head_dim must be hidden_size / num_attention_heads, but got "
            f"head_dim={head_width} with hidden_size={d_model} and num_attention_heads={n_heads}; "
            "HYDRA's layer has heads of that width only"
        )


def read_head_width(config: Mapping[str, Any]) -> int:
    """head_dim, or hidden_size / num_attention_heads where it is not given."""
    if config.get("head_dim") is not None:
        return read_size(config, "head_dim")
    return read_size(config, "hidden_size") // read_size(config, "num_attention_heads")


def read_layer_type(config: Mapping[str, Any], layer_index: int, supported: str) -> None:
    """Raise ConfigError unless layer_types says `supported` for this layer."""
    layer_types = read_field(config, "layer_types")
    if len(layer_types) != read_size(config, "num_hidden_layers"):
        raise ConfigError(
            f"layer_types must have num_hidden_layers={config['num_hidden_layers']} entries, "
            f"but got {len(layer_types)}; correct the config"
        )
    if layer_types[layer_index] != supported:
        raise ConfigError(
            f"layer_types[{layer_index}] must be {supported!r}, but got {layer_types[layer_index]!r}; "
            "choose another layer_index"
        )


def read_rope(config: Mapping[str, Any], layer_type: str | None = None) -> Rope:
    """The rotary embedding, from `rope_parameters`, or from `rope_theta` and `rope_scaling` as older files have it.

    Args:
        layer_type: under which name rope_parameters holds those of this layer, where layers differ.
    Raises:
        ConfigError: a scaling of positions or frequencies, such as yarn.
    """
    parameters = config.get("rope_parameters")
    if parameters is None:
        parameters = {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if name in config}
        parameters = {**parameters, **read_optional(config, "rope_scaling", {})}
    elif config.get("rope_scaling") is not None:
        raise ConfigError("rope_scaling must not stand beside rope_parameters, but got both; drop one")
    elif layer_type is not None:
        parameters = read_field(parameters, layer_type)
    for name in ("rope_type", "type"):
        if read_optional(parameters, name, "default") != "default":
            raise ConfigError(
                f"{name} of the rotary embedding must be 'default', but got {name}={parameters[name]!r}; "
                "models whose positions are scaled cannot be loaded"
            )
    unknown = [name for name in parameters if name not in ("rope_type", "type", "rope_theta", "partial_rotary_factor")]
    if unknown:
        raise ConfigError(
            "rope_parameters must hold rope_type, rope_theta and partial_rotary_factor only, "
            f"but got {', '.join(unknown)}; models whose positions are scaled cannot be loaded"
        )
    base = read_optional(parameters, "rope_theta", DEFAULT_ROPE_BASE)
    return Rope(float(base), float(read_optional(parameters, "partial_rotary_factor", 1.0)))


def read_full_rope_base(config: Mapping[str, Any]) -> float:
    """The base of a rotary embedding of all channels; ConfigError for one of a part."""
    rope = read_rope(config)
    if rope.fraction != 1.0:
        raise ConfigError(
            f"partial_rotary_factor must be 1.0 to be loaded, but got partial_rotary_factor={rope.fraction}; "
            "HYDRA's layer rotates every channel"
        )
    return rope.base

"""One attention layer, from and to transformers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hydra.attention.base import AttentionBackend
from hydra.attention.registry import load_layer_class, load_spec_class
from hydra.attention.spec import check_int
from hydra.convert.config import check_model_type, read_size
from hydra.convert.deepseek import DEEPSEEK_V3
from hydra.convert.formats import AttentionFormat
from hydra.convert.llama import LLAMA
from hydra.convert.minimax import MINIMAX
from hydra.convert.tensors import to_ours, to_theirs
from hydra.convert.zaya import ZAYA
from hydra.errors import ConfigError

FORMATS = {form.model_type: form for form in (DEEPSEEK_V3, LLAMA, MINIMAX, ZAYA)}


def load_attention(config: Mapping[str, Any], state: Mapping[str, Tensor], layer_index: int) -> AttentionBackend:
    """A layer of ours with the weights of theirs, copied, in their dtype and on their device.

    Llama becomes `gqa`, DeepSeek-V3 `mla`, ZAYA `ccgqa`, a lightning layer of MiniMax `lightning`; outputs are the same
    up to rounding.

    Args:
        config: as in config.json, or from to_dict() of transformers' config.
        state: the attention module's own state dict (`q_proj.weight` and so on). Of a whole model's, take what stands
            behind `model.layers.<layer_index>.self_attn.`.
        layer_index: which layer of the model it is, from 0.
    Raises:
        ConfigError: a model_type or a value of the config that HYDRA computes nothing for, named.
        CheckpointError: a tensor is missing, unexpected, or of the wrong shape, dtype or values, named.
    """
    form = FORMATS[check_model_type(config, list(FORMATS), "load_attention")]
    n_layers = read_size(config, "num_hidden_layers")
    check_int("layer_index", layer_index, minimum=0)
    if layer_index >= n_layers:
        raise ConfigError(
            f"layer_index must be below num_hidden_layers={n_layers}, but got layer_index={layer_index}; "
            "count layers from 0"
        )
    shape = form.read_shape(config, layer_index)
    spec = load_spec_class(form.backend).from_options(
        d_model=shape.d_model,
        n_heads=shape.n_heads,
        layer_index=layer_index,
        n_layers=n_layers,
        options=shape.options,
    )
    ours = to_ours(form.pair_tensors(spec, config), state)
    with torch.device("meta"):
        layer = load_layer_class(form.backend)(spec)
    layer.load_state_dict(ours, assign=True)
    return layer


def save_attention(layer: AttentionBackend) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and state dict of transformers for a layer: the inverse of load_attention.

    Returns:
        The fields of a config that the layer depends on (transformers fills in the others), and the state dict of their
        attention module, copied. What was loaded is saved to the bit, and the other way round, except for ZAYA's
        temperatures (hydra.convert.zaya says how far) and MiniMax's decays, which are computed anew for blocks of 256
        tokens.
    Raises:
        ConfigError: a layer of which transformers has no like; the option is named.
    """
    form = find_format(layer)
    config = form.write_config(layer.spec)
    return config, to_theirs(form.pair_tensors(layer.spec, config), layer.state_dict())


def find_format(layer: AttentionBackend) -> AttentionFormat:
    """The format whose backend the layer is; ConfigError for a class that is none."""
    for form in FORMATS.values():
        if type(layer) is load_layer_class(form.backend):
            return form
    raise ConfigError(
        f"a layer to be saved must be one of {', '.join(form.backend for form in FORMATS.values())}, "
        f"but got {type(layer).__name__}; transformers has no module that computes the same"
    )

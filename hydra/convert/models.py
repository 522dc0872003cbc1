"""Whole models, from and to transformers: Llama."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hydra.convert.config import check_fixed, check_model_type, read_field, read_optional, read_size
from hydra.convert.llama import LLAMA
from hydra.convert.tensors import TensorPair, same_tensor, to_ours, to_theirs, with_prefixes
from hydra.errors import CheckpointError, ConfigError
from hydra.model.framework import HydraModel, ModelSpec

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def load_transformers(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> HydraModel:
    """A HydraModel with the weights of a Llama, copied, in their dtype and on their device; same logits up to rounding.

    Args:
        config: as in config.json, or from to_dict() of transformers' LlamaConfig.
        state: of LlamaForCausalLM; with tied embeddings `lm_head.weight` may be left out, as it is in files.
    Raises:
        ConfigError: a model_type or a value of the config that HYDRA computes nothing for, named.
        CheckpointError: a tensor is missing, unexpected, or of the wrong shape, dtype or values, named.
    """
    check_model_type(config, [LLAMA.model_type], "load_transformers (load_attention takes single layers of others)")
    check_fixed(config, hidden_act="silu", mlp_bias=False)
    shape = LLAMA.read_shape(config, 0)
    spec = ModelSpec(
        vocab_size=read_field(config, "vocab_size"),
        d_model=shape.d_model,
        n_layers=read_size(config, "num_hidden_layers"),
        n_heads=shape.n_heads,
        attention=LLAMA.backend,
        attention_options=shape.options,
        feed_forward="swiglu",
        d_feed_forward=read_field(config, "intermediate_size"),
        tie_embeddings=read_optional(config, "tie_word_embeddings", False),
        norm_eps=read_field(config, "rms_norm_eps"),
    )
    if spec.tie_embeddings:
        state = without_tied_head(state)
    ours = to_ours(pair_tensors(spec, config), state)
    with torch.device("meta"):
        model = HydraModel(spec)
    model.load_state_dict(ours, assign=True)
    return model


def save_transformers(model: HydraModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and state dict of a LlamaForCausalLM for a model: the inverse of load_transformers.

    Returns:
        Fields of the config, ready for JSON, and the weights, copied, the same to the bit when loaded again. With tied
        embeddings there is no `lm_head.weight`, as in files of transformers.
    Raises:
        ConfigError: a model that is no Llama; the field is named.
    """
    spec = model.spec
    layers = spec.plan_layers()
    for index, layer in enumerate(layers):
        if layer.name != LLAMA.backend:
            raise ConfigError(
                f"attention must be {LLAMA.backend} in every block to be saved as a Llama, but got {layer.name} in "
                f"block {index}; save single layers with save_attention"
            )
    if spec.feed_forward != "swiglu":
        raise ConfigError(
            f"feed_forward must be swiglu to be saved as a Llama, but got feed_forward={spec.feed_forward!r}; "
            "transformers' Llama has no other"
        )
    configs = [LLAMA.write_config(layer.spec) for layer in layers]
    for index, config in enumerate(configs):
        if config != configs[0]:
            raise ConfigError(
                f"attention must have the same options in every block to be saved as a Llama, but got others in block "
                f"{index} than in block 0; a Llama has one kind of block"
            )
    config = {
        **configs[0],
        "architectures": ["LlamaForCausalLM"],
        "dtype": str(model.final_norm.weight.dtype).removeprefix("torch."),
        "vocab_size": spec.vocab_size,
        "intermediate_size": spec.d_feed_forward,
        "hidden_act": "silu",
        "mlp_bias": False,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_embeddings,
    }
    return config, to_theirs(pair_tensors(spec, config), model.state_dict())


def pair_tensors(spec: ModelSpec, config: Mapping[str, Any]) -> list[TensorPair]:
    """Every tensor of the model."""
    d_model, d_feed_forward = spec.d_model, spec.d_feed_forward
    pairs = [
        same_tensor(EMBEDDING, "embedding.weight", spec.vocab_size, d_model),
        same_tensor("model.norm.weight", "final_norm.weight", d_model),
    ]
    if not spec.tie_embeddings:
        pairs.append(same_tensor(HEAD, "head.weight", spec.vocab_size, d_model))
    for index, layer in enumerate(spec.plan_layers()):
        block = [
            same_tensor("input_layernorm.weight", "attention_norm.weight", d_model),
            same_tensor("post_attention_layernorm.weight", "feed_forward_norm.weight", d_model),
            same_tensor("mlp.gate_proj.weight", "feed_forward.gate.weight", d_feed_forward, d_model),
            same_tensor("mlp.up_proj.weight", "feed_forward.up.weight", d_feed_forward, d_model),
            same_tensor("mlp.down_proj.weight", "feed_forward.down.weight", d_model, d_feed_forward),
            *with_prefixes(LLAMA.pair_tensors(layer.spec, config), "self_attn.", "attention."),
        ]
        pairs += with_prefixes(block, f"model.layers.{index}.", f"blocks.{index}.")
    return pairs


def without_tied_head(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights without the head, which may be there if it is the embedding."""
    if HEAD not in state or EMBEDDING not in state:
        return state
    if not torch.equal(state[HEAD], state[EMBEDDING]):
        raise CheckpointError(
            f"{HEAD} must equal {EMBEDDING} with tie_word_embeddings=true, but got other values; "
            "set tie_word_embeddings=false"
        )
    return {name: tensor for name, tensor in state.items() if name != HEAD}

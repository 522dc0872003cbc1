"""Whole Llamas, without transformers: what comes back, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hydra.convert import load_transformers, save_transformers
from hydra.errors import CheckpointError, ConfigError
from hydra.model.framework import HydraModel
from hydra.testing.specs import build_random_model


def build(**changes: Any) -> HydraModel:
    return build_random_model(torch.float32, **{"attention_options": {"n_kv_heads": 2, "rope_base": 700.0}, **changes})


def save(**changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return save_transformers(build(**changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_model_comes_back_to_the_bit(is_tied: bool, dtype: torch.dtype) -> None:
    model = build(tie_embeddings=is_tied, norm_eps=1e-3).to(dtype)
    config, state = save_transformers(model)
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert ("lm_head.weight" in state) is not is_tied
    again = load_transformers(config, state)
    assert [layer.spec for layer in again.spec.plan_layers()] == [layer.spec for layer in model.spec.plan_layers()]
    assert {**again.spec.to_dict(), "attention_options": {}} == {**model.spec.to_dict(), "attention_options": {}}
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert all(parameter.requires_grad for parameter in again.parameters())
    state["model.norm.weight"].zero_()
    assert bool(again.final_norm.weight.any())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "zaya"}, "model_type must be one of llama for load_transformers"),
    ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
    ({"mlp_bias": True}, "mlp_bias must be False"),
    ({"attention_bias": True}, "attention_bias must be False"),
    ({"vocab_size": None}, "vocab_size must be in the config"),
    ({"rms_norm_eps": None}, "rms_norm_eps must be in the config"),
    ({"intermediate_size": None}, "intermediate_size must be in the config"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_configs_that_cannot_be_computed_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    config, state = save()
    with pytest.raises(ConfigError, match=message):
        load_transformers({**config, **changes}, state)


@pytest.mark.parametrize("is_tied", [False, True])
def test_each_tensor_is_needed_and_no_other_is_taken(is_tied: bool) -> None:
    config, state = save(tie_embeddings=is_tied)
    for name, tensor in state.items():
        with pytest.raises(CheckpointError, match=f"weights must hold {name}, but got only"):
            load_transformers(config, {other: value for other, value in state.items() if other != name})
        with pytest.raises(CheckpointError, match=f"{name} must have shape"):
            load_transformers(config, {**state, name: tensor[1:]})
    with pytest.raises(CheckpointError, match=r"every weight must be known, but got model\.layers\.2\.mlp"):
        load_transformers(config, {**state, "model.layers.2.mlp.up_proj.weight": torch.zeros(3)})


def test_a_head_beside_a_tied_embedding_must_be_the_embedding() -> None:
    config, state = save(tie_embeddings=True)
    embedding = state["model.embed_tokens.weight"]
    load_transformers(config, {**state, "lm_head.weight": embedding})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight must equal model\.embed_tokens\.weight"):
        load_transformers(config, {**state, "lm_head.weight": embedding + 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "gqa, ccgqa", "attention_options": {}}, "attention must be gqa .* but got ccgqa in block 1"),
        ({"feed_forward": "squared_relu"}, "feed_forward must be swiglu"),
        ({"attention_options": {"qk_norm": True}}, "qk_norm must be False"),
        ({"attention": "gqa, gqa(n_kv_heads=4)", "attention_options": {}}, "the same options in every block"),
    ],
)
def test_models_that_are_no_llamas_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        save(**changes)

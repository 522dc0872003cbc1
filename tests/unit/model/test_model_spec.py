import json
from typing import Any

import pytest

from hydra.errors import ConfigError
from hydra.model.framework import ModelSpec, build_model
from hydra.testing.specs import tiny_model_spec


def test_round_trip_through_json() -> None:
    spec = tiny_model_spec(attention="ccgqa", attention_options={"n_kv_heads": 1, "rope_base": 500.0}, norm_eps=1e-6)
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert build_model(spec.to_dict()).spec == spec


def test_a_spec_keeps_its_own_options() -> None:
    options = {"n_kv_heads": 2}
    spec = tiny_model_spec(attention_options=options)
    options["n_kv_heads"] = 3
    assert spec.attention_options == {"n_kv_heads": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, "d_model must be an integer of at least 1, but got d_model=0"),
        ({"n_layers": True}, "n_layers must be an integer"),
        ({"vocab_size": 61.0}, "vocab_size must be an integer"),
        ({"n_heads": 5}, "n_heads must divide d_model"),
        ({"attention": "gpa"}, "attention must be one of ccgqa, gqa, lightning, mla, .* did you mean 'gqa'"),
        (
            {"attention_options": {"kv_heads": 2}},
            "option must be one of n_kv_heads, rope_base, .* did you mean 'n_kv_heads'",
        ),
        ({"attention_options": [2]}, "attention_options must be a mapping"),
        ({"feed_forward": "swigul"}, "feed_forward must be one of squared_relu, swiglu, .* did you mean 'swiglu'"),
        ({"tie_embeddings": 1}, "tie_embeddings must be True or False"),
        ({"norm_eps": -1e-5}, "norm_eps must be a finite number above 0.0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_model_spec(**changes)


def test_from_dict_is_strict() -> None:
    fields = tiny_model_spec().to_dict()
    with pytest.raises(ConfigError, match="but got model field='n_layer'; did you mean 'n_layers'"):
        ModelSpec.from_dict({**fields, "n_layer": 2})
    del fields["norm_eps"]
    with pytest.raises(ConfigError, match="but got none of norm_eps"):
        ModelSpec.from_dict(fields)

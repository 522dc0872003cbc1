"""What a comparison is asked for, and how its arms are made equal."""

import dataclasses
import json
import re
from typing import Any

import pytest

from hydra.errors import ConfigError
from scripts.arms import (
    CACHE_TOLERANCE,
    build_all_arms,
    build_arms,
    count_runs,
    describe_left_out,
    describe_shortcomings,
)
from scripts.comparison import EQUALITIES, ComparisonConfig


def comparison(**parameters: Any) -> ComparisonConfig:
    return ComparisonConfig.from_parameters({"preset": "small", **parameters})


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"lerning_rate": 1}, "lerning_rate: there is no such parameter; did you mean learning_rate?"),
        ({"n_seed": 3}, "n_seed: there is no such parameter; did you mean n_seeds?"),
        ({"arms": []}, "arms"),
        ({"arms": ["ccgqa", "mla", "ccgqa"]}, "but 'ccgqa' is the same model as 'ccgqa', an arm before it"),
        ({"arms": ["ccgqa", "1*ccgqa"]}, "but '1*ccgqa' is the same model as 'ccgqa', an arm before it"),
        ({"arms": ["gqa(n_kv_heads=4)"]}, "is the same model as 'gqa(n_kv_heads=4)', the baseline; leave one out"),
        ({"arms": ["2*gqa(n_kv_heads=4, window=0)"]}, "'gqa(n_kv_heads=4)', the baseline; leave one out"),
        ({"arms": ["foo"]}, "^arms: attention must be one of ccgqa, gqa, lightning, mla, but got attention='foo'"),
        ({"baseline": "nope"}, "^baseline: attention must be one of"),
        ({"arms": [7]}, "^arms: input should be a valid string, but got 7 (int)$"),
        ({"equal": ["colour"]}, "^equal: input should be .*, but got 'colour' (str)$"),
        ({"equal": ["flops", "flops"]}, "equal must be distinct, without a second 'flops', but got"),
        (
            {"learning_rate_factors": [-1, 1]},
            "factors: input should be greater than 0, but got -1 (int)$",
        ),
        (
            {"learning_rate_factors": [1, 2]},
            "factors: list should have at least 3 items, not 2, but got",
        ),
        ({"cost_lengths": 5}, "^cost_lengths: input should be a list, but got 5 (int)$"),
        ({"window": 64}, "window: .* an option of attention gqa: write in the brackets of an arm, as gqa(window=64)"),
        ({"lr": 1}, "lr: there is no such parameter; did you mean learning_rate?"),
        ({"dropout": 0.5}, "dropout: there is no such parameter; scripts/config.py lists all, also for notebooks"),
        ({"arms": ["ccgqua"]}, "did you mean 'ccgqa'"),
        ({"arms": ["3*ccgqa, gqa(windov=3)"]}, "did you mean 'window'"),
        ({"arms": ["5*ccgqa"]}, "at most n_layers=4"),
        ({"equal": ["speed"]}, "equal: input should be 'parameters', 'flops' or 'kv_bytes', but got 'speed'"),
        ({"n_seeds": 0}, "n_seeds"),
        ({"learning_rate_factors": [1.0, 2.0]}, "learning_rate_factors"),
        ({"learning_rate_factors": [1.0, 2.0, 2.0]}, "learning_rate_factors must be distinct, without a second 2.0"),
        ({"kv_share": 0.0}, "kv_share"),
        ({"attention": "gqa"}, "attention: name attentions in arms and baseline"),
        ({"seed": 3}, "seed: give n_seeds"),
        ({"preset": "smal"}, "did you mean small"),
        ({"max_steps": "many"}, "max_steps"),
        ({"n_heads": 3}, "n_heads must divide d_model"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused_by_name(parameters: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=re.sub(r"[?()]|(?<!\.)\*", r"\\\g<0>", told)):
        comparison(**parameters)


def test_a_comparison_goes_round_and_tells_its_differences() -> None:
    config = comparison(arms=["ccgqa"], n_seeds=5, max_steps=70)
    assert ComparisonConfig.from_json(config.to_json()) == config
    assert config.fields == {"max_steps": 70}
    assert config.differences()["max_steps"] == (None, 70)
    assert config.differences()["n_seeds"] == (3, 5)
    assert config.differences(config) == {}
    assert repr(comparison().differences(config)["max_steps"]) == "(70, the preset's)"
    assert config.training_config("ccgqa", seed=4).max_steps == 70
    arguments = config.papermill_arguments()
    assert arguments[arguments.index("n_seeds") - 1 :][:3] == ["-p", "n_seeds", "5"]
    assert json.loads(arguments[arguments.index("-y") + 1]) == {"arms": ["ccgqa"]}
    assert comparison().papermill_arguments() == []
    # At equal parameters, FLOPs and KV bytes, two arms each, at three rates and on five seeds.
    assert count_runs(config, build_all_arms(config)) == 3 * 2 * (3 + 5)


@pytest.mark.parametrize("equal", EQUALITIES)
def test_arms_are_equal_in_what_they_are_said_to_be(equal: str) -> None:
    config = comparison()
    (base, *others), left_out = build_arms(config, equal)
    assert base.name == config.baseline
    assert {arm.name for arm in others} | {one.name for one in left_out} == set(config.arms)
    assert others
    for arm in others:
        quantity = "forward_flops" if equal == "flops" else "n_parameters"
        # One channel more or less of the feed-forward layers is what cannot be met exactly.
        assert getattr(arm, quantity) == pytest.approx(getattr(base, quantity), rel=3e-3), arm.name
        if equal == "kv_bytes":
            assert arm.cache_bytes == pytest.approx(base.cache_bytes, rel=CACHE_TOLERANCE), arm.name
        else:
            assert arm.attention == arm.name
    if equal == "parameters":
        assert base.config == config.training_config(config.baseline)
    if equal == "kv_bytes":
        whole = build_arms(config, "parameters")[0][0]
        assert base.cache_bytes == pytest.approx(config.kv_share * whole.cache_bytes, rel=CACHE_TOLERANCE)
        assert base.n_parameters == pytest.approx(whole.n_parameters, rel=3e-3)


def test_what_cannot_be_made_equal_is_left_out_with_the_reason() -> None:
    config = comparison(arms=["gqa(n_kv_heads=1)", "lightning", "ccgqa"])
    _, left_out = build_arms(config, "kv_bytes")
    reasons = {one.name: one.reason for one in left_out}
    assert "no layer of it has one" in reasons["lightning"]
    assert "the same model as gqa(n_kv_heads=4)" in reasons["gqa(n_kv_heads=1)"]


def test_large_presets_can_be_compared() -> None:
    """Their options are those of gqa, and not every arm has them."""
    config = ComparisonConfig.from_parameters(
        {"preset": "50M", "baseline": "gqa(n_kv_heads=8)", "arms": ["ccgqa", "mla"]}
    )
    assert config.training_config("mla").attention_options == {}


def test_options_that_set_caches_are_not_mixed() -> None:
    _, left_out = build_arms(comparison(arms=["ccgqa", "3*mla, gqa"]), "kv_bytes")
    assert ["kv_latent_width and n_kv_heads" in one.reason for one in left_out] == [True]


TOO_WIDE = "mla(kv_latent_width=10000)"


def test_what_is_left_out_is_told_and_a_comparison_of_nobody_is_not_run() -> None:
    config = comparison(arms=[TOO_WIDE])
    found = build_all_arms(config)
    told = "\n".join(describe_left_out(found))
    assert f"left out at equal parameters: {TOO_WIDE}, because without its feed-forward layers" in told
    assert "nothing is trained at equal parameters: no arm is left" in told
    assert "nothing is trained at equal kv bytes" not in told
    assert count_runs(config, found) == 2 * (3 + 3)
    assert describe_shortcomings(config, found) == told.splitlines()
    few = describe_shortcomings(dataclasses.replace(config, n_seeds=2), found)
    assert few[0] == "no verdict will be given: that needs at least 3 seeds, and n_seeds is 2"


def test_a_comparison_without_any_arm_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"none can be made equal to it:\nleft out at equal parameters: mla"):
        build_all_arms(comparison(arms=[TOO_WIDE], equal=["parameters", "flops"]))
    with pytest.raises(ConfigError, match=r"baseline lightning cannot be given kv_share=0\.25 .*, or leave kv"):
        build_all_arms(comparison(baseline="lightning", arms=["ccgqa"]))


@pytest.mark.parametrize(
    ("asked", "label"),
    [
        (TOO_WIDE, f"mla(kv_latent_width=48) in place of {TOO_WIDE}"),
        ("mla", "mla"),
        ("mla(kv_latent_width=48)", "mla(kv_latent_width=48)"),
        ("3*lightning, gqa(n_kv_heads=4)", "lightning, lightning, lightning, gqa(n_kv_heads=1) in place of 3*lig"),
    ],
)
def test_an_option_that_was_fixed_and_solved_for_is_named_as_trained(asked: str, label: str) -> None:
    (base, arm), _ = build_arms(comparison(arms=[asked]), "kv_bytes")
    assert arm.label.startswith(label)
    assert base.label == "gqa(n_kv_heads=1) in place of gqa(n_kv_heads=4)"
    assert build_arms(comparison(), "parameters")[0][0].label == "gqa(n_kv_heads=4)"

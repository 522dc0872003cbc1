"""One config: what is unknown, mistyped or impossible is named before anything starts."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import yaml

from hydra.errors import ConfigError, RunError
from scripts.config import CALLED_ELSEWHERE, TrainingConfig, refuse_changed_config


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"lerning_rate": 1}, ["lerning_rate", "learning_rate"]),
        ({"preset": "debgu"}, ["debug"]),
        ({"max_steps": "300"}, ["max_steps", "integer", "'300'"]),
        ({"max_steps": 1e3}, ["max_steps", "1000.0"]),
        ({"max_steps": True}, ["max_steps", "True"]),
        ({"max_steps": 0}, ["max_steps", "greater than 0"]),
        ({"learning_rate": float("inf")}, ["learning_rate", "finite"]),
        ({"learning_rate": float("nan")}, ["learning_rate", "finite"]),
        ({"learning_rate": -1.0}, ["learning_rate"]),
        ({"tie_embeddings": "false"}, ["tie_embeddings", "'false'"]),
        ({"schedule": "linear"}, ["schedule", "cosine"]),
        ({"micro_batch_size": 3}, ["micro_batch_size", "divide batch_size", "3"]),
        ({"n_heads": 7}, ["n_heads", "d_model"]),
        ({"warmup_steps": 10_000}, ["warmup_steps", "max_steps"]),
        ({"decay_fraction": 1.5}, ["decay_fraction", "1.5"]),
        ({"attention": "ccgqaa"}, ["ccgqa", "gqa"]),
        ({"attention_options": {"n_kv_head": 1}}, ["attention_options", "n_kv_head", "n_kv_heads"]),
        ({"attention_options": {"n_kv_heads": "two"}}, ["n_kv_heads", "two"]),
        ({"corpus": []}, ["corpus"]),
        ({"corpus": ""}, ["corpus: string should have at least 1 character, but got '' (str)"]),
        ({"corpus": 5}, ["corpus: input should be a list, but got 5 (int)"]),
        ({"n_kv_heads": 3}, ["an option of attention ccgqa and gqa: write -y '{attention_options: {n_kv_heads: 3}}'"]),
        ({"window": 64}, ["window: ", "an option of attention gqa: write -y '{attention_options: {window: 64}}'"]),
        ({"lr": 1}, ["lr: there is no such parameter; did you mean learning_rate?"]),
        ({"seq_len": 128}, ["did you mean context_length?"]),
        ({"Epochs": 1}, ["did you mean max_steps?"]),
        ({"dropout": 0.5}, ["dropout: there is no such parameter; scripts/config.py lists all, also for notebooks"]),
        ({"threads": 10**6}, ["threads"]),
        ({"a=1; import os": 2}, ["a=1; import os"]),
        ({"preset_name": "tiny", "max_steps": 0}, ["preset_name", "did you mean preset?", "max_steps"]),
        ({"name": "x", "self": 1}, ["name: there is no such parameter", "self: there is no such parameter"]),
    ],
)
def test_bad_parameters_are_named(parameters: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig.from_parameters(parameters)
    for word in words:
        assert word in str(caught.value)


def test_what_other_programs_call_a_field_is_a_field_here() -> None:
    names = {field.name for field in fields(TrainingConfig)}
    assert set(CALLED_ELSEWHERE.values()) <= names
    assert not set(CALLED_ELSEWHERE) & names


def test_of_a_bad_item_only_the_item_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig.from_parameters({"corpus": ["a", 7, ""]})
    assert len(str(caught.value).splitlines()) == 2
    assert "items" not in str(caught.value)


def test_the_constructor_and_replace_tell_the_same() -> None:
    with pytest.raises(ConfigError, match="d_modl: there is no such parameter; did you mean d_model"):
        TrainingConfig(d_modl=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"TrainingConfig.preset\(name"):
        TrainingConfig(preset="tiny")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="micro_batch_size must divide batch_size=1, or be 0"):
        replace(TrainingConfig.preset("tiny"), batch_size=1)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig.from_parameters({"lerning_rate": 1, "max_steps": "x", "seed": -1})
    for word in ("lerning_rate", "max_steps", "seed"):
        assert word in str(caught.value)


def test_json_round_trip_and_strictness() -> None:
    config = TrainingConfig.preset("tiny", learning_rate=1, corpus=["a", "b"], attention_options={"n_kv_heads": 2})
    assert isinstance(config.learning_rate, float)
    assert config.corpus == ("a", "b")
    assert TrainingConfig.from_json(config.to_json()) == config
    stored = json.loads(config.to_json())
    assert set(stored) == {field.name for field in fields(TrainingConfig)}
    del stored["seed"]
    with pytest.raises(ConfigError, match="seed"):
        TrainingConfig.from_json(json.dumps(stored))
    with pytest.raises(ConfigError, match="surplus"):
        TrainingConfig.from_json(json.dumps({**asdict(config), "surplus": 1}))


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        TrainingConfig().seed = 1  # type: ignore[misc]


def test_another_config_under_the_same_name_is_refused_with_the_difference_and_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs" / "pretrain"
    refuse_changed_config(TrainingConfig(), run_dir)
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(TrainingConfig().to_json())
    (tmp_path / "runs" / "pretrain-2").mkdir()
    refuse_changed_config(TrainingConfig(), run_dir)
    with pytest.raises(RunError) as caught:
        refuse_changed_config(TrainingConfig(seed=3), run_dir)
    assert "seed: 0 there, 3 asked for" in str(caught.value)
    assert "-r run_dir runs/pretrain-3" in str(caught.value)
    shorter = TrainingConfig(max_steps=300, allow_changes=("max_steps",))
    refuse_changed_config(shorter, run_dir)
    (run_dir / "state.json").write_text(json.dumps({"status": "interrupted", "step": 301}))
    with pytest.raises(RunError, match=r"max_steps must be at least 301, the steps that .* has taken, but got 300"):
        refuse_changed_config(shorter, run_dir)
    with pytest.raises(RunError, match=r"must be a folder, but .* is a file"):
        refuse_changed_config(TrainingConfig(), run_dir / "config.json")


def test_papermill_arguments_ask_for_the_same_config() -> None:
    from papermill.cli import _resolve_type

    config = TrainingConfig.preset(
        "tiny", seed=4, corpus=("a b",), tie_embeddings=True, sample_prompt="1", learning_rate=1e-4, tokenizer="12e4567"
    )
    arguments = config.papermill_arguments()
    parameters: dict[str, object] = {}
    while arguments:
        match arguments:
            case ["-p", name, value, *rest]:
                parameters[name] = _resolve_type(value)
            case ["-r", name, value, *rest]:
                parameters[name] = value
            case ["-y", text, *rest]:
                parameters.update(yaml.safe_load(text))
        arguments = rest
    assert TrainingConfig.from_parameters(parameters) == config


def test_a_folder_of_something_else_is_not_taken_for_a_new_run(tmp_path: Path) -> None:
    (tmp_path / "pretrain.ipynb").write_text("{}")
    (tmp_path / "report.html").write_text("")
    refuse_changed_config(TrainingConfig(), tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(RunError, match="holds checkpoints"):
        refuse_changed_config(TrainingConfig(), tmp_path)

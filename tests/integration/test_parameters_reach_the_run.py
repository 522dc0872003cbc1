"""Every field of the config, given to papermill by its own name, arrives in config.json as given."""

import json
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

from scripts.config import TrainingConfig

ROOT = Path(__file__).parents[2]


def every_field(corpus: Path, data_dir: Path) -> dict[str, object]:
    """A value for each field, none of them the default, that together make a run of a few seconds."""
    return {
        "corpus": [str(corpus / "00.txt"), str(corpus)],
        "tokenizer": "characters",
        "vocab_size": 300,
        "validation_fraction": 0.1,
        "data_dir": str(data_dir),
        "d_model": 48,
        "n_layers": 1,
        "n_heads": 8,
        "attention": "gqa",
        "attention_options": {"n_kv_heads": 2, "rope_base": 500.0, "qk_norm": True},
        "feed_forward": "swiglu",
        "d_feed_forward": 40,
        "tie_embeddings": True,
        "zero_init": False,
        "norm_eps": 1e-5,
        "context_length": 24,
        "batch_size": 6,
        "micro_batch_size": 3,
        "max_steps": 4,
        "optimizer": "adamw",
        "learning_rate": 2e-3,
        "muon_learning_rate": 0.03,
        "muon_momentum": 0.8,
        "muon_weight_decay": 0.02,
        "schedule": "cosine",
        "warmup_steps": 1,
        "decay_fraction": 0.25,
        "final_learning_rate_fraction": 0.1,
        "weight_decay": 0.05,
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "adam_eps": 1e-7,
        "adam_state": "8bit",
        "max_gradient_norm": 0.5,
        "spike_deviations": 30.0,
        "max_skipped_steps": 3,
        "seed": 7,
        "device": "cpu",
        "threads": 1,
        "dtype": "bfloat16",
        "attention_kernel": "blocked",
        "kernels": "torch",
        "compile_from_step": 2,
        "activation_checkpointing": "full",
        "optimizer_offload": "no",
        "memory_limit_mib": 4000,
        "log_every": 2,
        "eval_every": 3,
        "checkpoint_every": 3,
        "keep_checkpoints": 1,
        "keep_best": False,
        "checkpoints_in_background": True,
        "when_disk_is_full": "go_on",
        "allow_changes": ["max_steps"],
        "wandb_mode": "offline",
        "wandb_project": "notes",
        "sample_tokens": 5,
        "sample_prompt": "note",
    }


def test_every_field_by_parameter(tmp_path: Path, corpus_dir: Path) -> None:
    values = every_field(corpus_dir, tmp_path / "data")
    names = {field.name for field in fields(TrainingConfig)}
    # The record of an attention class's file is made from `attention`, and asked for by nobody.
    assert {*values, "preset_name", "attention_code"} == names
    defaults = asdict(TrainingConfig())
    assert [name for name, value in values.items() if value == defaults[name]] == []

    run_dir = tmp_path / "run"
    arguments = ["-p", "preset", "tiny", "-r", "run_dir", str(run_dir)]
    for name, value in values.items():
        if isinstance(value, list | dict):
            arguments += ["-y", json.dumps({name: value})]
        else:
            arguments += ["-r" if isinstance(value, str) else "-p", name, str(value)]
    papermill = str(Path(sys.executable).with_name("papermill"))
    command = [papermill, "notebooks/pretrain.ipynb", str(run_dir / "pretrain.ipynb"), "--engine", "hydra", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run_dir / "config.json").read_text()) == {**values, "preset_name": "tiny", "attention_code": {}}
    assert json.loads((run_dir / "environment.json").read_text())["resolved"]["threads"] == 1

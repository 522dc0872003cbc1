"""How close does the predicted peak memory come to the measured one? On configs that nothing was fitted to.

    python diagnostics/memory_accuracy.py [calibration | NAME ...]

For each config a process of its own trains a whole run of few steps, with the real trainer on real text, and compares
what was planned before the first step with the most memory that was resident from there on (ru_maxrss: all of the
process, imports included, evaluation and checkpoint too).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MIB = 2**20
N_STEPS = 3
GQA = {"attention": "gqa"}
EAGER: dict[str, Any] = {"compile_from_step": None}
COMPILED: dict[str, Any] = {"compile_from_step": 0}  # left out: compiled after the first step
# What the constants in hydra/runtime/memory/plan.py were fitted to.
SMALL = {"d_model": 384, "n_heads": 6, "n_layers": 6, "d_feed_forward": 1536}
CALIBRATION: dict[str, dict[str, Any]] = {
    "c1": {},
    "c2": EAGER,
    "c3": {**GQA, **EAGER, **SMALL, "d_model": 512, "n_heads": 8, "vocab_size": 32000, "optimizer": "adamw"},
    "c4": {**GQA, **COMPILED, **SMALL, "d_model": 512, "n_heads": 8, "vocab_size": 32000},
    "c5": {**GQA, **EAGER, **SMALL, "batch_size": 16},
    "c6": {**SMALL, "batch_size": 16, "feed_forward": "swiglu"},
    "c7": {**GQA, **EAGER, **SMALL, "d_model": 256, "n_heads": 4, "dtype": "float32", "batch_size": 16},
    "c8": {**GQA, **COMPILED, **SMALL},
    "c9": {**GQA, **EAGER, **SMALL, "n_layers": 10, "vocab_size": 8192, "activation_checkpointing": "full"},
    "c10": {**GQA, **SMALL, "n_layers": 10, "vocab_size": 8192, "activation_checkpointing": "full"},
}


def shape(d_model: int, n_heads: int, n_layers: int, vocab_size: int, **fields: Any) -> dict[str, Any]:
    """Fields of a model whose feed-forward layer is four times as wide."""
    return {
        "d_model": d_model,
        "n_heads": n_heads,
        "n_layers": n_layers,
        "d_feed_forward": 4 * d_model,
        "vocab_size": vocab_size,
        **fields,
    }


HELD_OUT: dict[str, dict[str, Any]] = {
    "1": shape(448, 7, 5, 12000, **GQA),
    "2": shape(448, 7, 7, 4096, **EAGER, optimizer="adamw", feed_forward="swiglu"),
    "3": shape(640, 10, 4, 24000, **GQA, **COMPILED, batch_size=16, micro_batch_size=8),
    "4": shape(640, 10, 4, 24000, **GQA, **EAGER, optimizer="adamw", feed_forward="swiglu", micro_batch_size=4),
    "5": shape(288, 9, 14, 2048, **COMPILED, context_length=128, batch_size=16, micro_batch_size=16),
    "6": shape(192, 6, 10, 8192, **GQA, **EAGER, context_length=1024, batch_size=4, micro_batch_size=2),
    "7": shape(256, 4, 6, 16384, **GQA, context_length=1024, batch_size=4, micro_batch_size=4),
    "8": shape(256, 8, 6, 4096, **GQA, **EAGER, context_length=2048, batch_size=2, micro_batch_size=1),
    "9": shape(512, 8, 10, 32768, micro_batch_size=4, activation_checkpointing="full"),
    "10": shape(384, 6, 6, 8192, **GQA, **COMPILED, dtype="float32", optimizer="adamw"),
    "11": shape(
        512,
        8,
        12,
        257,
        **GQA,
        **EAGER,
        tie_embeddings=True,
        context_length=512,
        batch_size=4,
        micro_batch_size=4,
        activation_checkpointing="full",
    ),
    "12": shape(
        1024, 16, 4, 32000, **GQA, **EAGER, batch_size=4, micro_batch_size=4, attention_options={"n_kv_heads": 4}
    ),
}


def main(names: list[str]) -> None:
    """Print one line for each config."""
    configs = CALIBRATION if names == ["calibration"] else HELD_OUT
    if names and names != ["calibration"]:
        configs = {name: fields for name, fields in (CALIBRATION | HELD_OUT).items() if name in names}
    print("| config | fields beside those of `debug` | predicted MiB | measured MiB | predicted / measured |")
    print("|---|---|---|---|---|")
    ratios = []
    for name, fields in configs.items():
        told = in_child(fields)
        ratios.append(told["predicted"] / told["measured"])
        changed = ", ".join(f"{field}={value}" for field, value in fields.items())
        print(
            f"| {name} | {changed} | {told['predicted'] / MIB:.0f} | {told['measured'] / MIB:.0f} | {ratios[-1]:.3f} |",
            flush=True,
        )
        print({kind: round(n / MIB) for kind, n in told["parts"].items()}, file=sys.stderr, flush=True)
    print(f"predicted / measured: {min(ratios):.3f} to {max(ratios):.3f}")


def in_child(fields: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own printed as its last line."""
    with tempfile.TemporaryDirectory() as run_dir:
        command = [sys.executable, __file__, "train", run_dir, json.dumps(fields)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def train(run_dir: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Train a whole run of few steps: data, plan, evaluation, checkpoint and all; the bytes predicted and measured.

    The text is bytes; the model has the vocabulary that is asked for, of which it then uses the first 257 rows.
    """
    import resource
    from unittest import mock

    from hydra.data import Dataset
    from scripts.config import TrainingConfig
    from scripts.preparation import open_data
    from scripts.trainer import Trainer

    def open_with_vocabulary(config: TrainingConfig, run_dir: Path, newest: Path | None) -> Dataset:
        dataset = open_data(config, run_dir, newest)
        dataset.manifest["tokenizer"]["vocab_size"] = config.vocab_size
        return dataset

    common = {
        "corpus": str(ROOT / "tests" / "assets" / "notes"),
        "tokenizer": "bytes",
        "data_dir": "data/memory-accuracy",
        "max_steps": N_STEPS,
        "warmup_steps": 1,
        "eval_every": N_STEPS,
        "checkpoint_every": N_STEPS,
        "log_every": 1,
        "sample_tokens": 8,
    }
    trainer = Trainer(TrainingConfig.preset("debug", **common, **fields), run_dir)
    with mock.patch("scripts.trainer.open_data", open_with_vocabulary):
        trainer.train()
    expected = trainer.config.model_spec(trainer.config.vocab_size)
    assert trainer.model.spec == expected, (trainer.model.spec, expected)
    prediction = trainer.plan.prediction
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"predicted": prediction.total, "measured": peak, "parts": prediction.by_kind()}


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        sys.path.insert(0, str(ROOT))
        print(json.dumps(train(sys.argv[2], json.loads(sys.argv[3]))))
    else:
        main(sys.argv[1:])

"""How close does the predicted peak memory come to the measured one? On configs that nothing was fitted to.

    python diagnostics/memory_accuracy.py [calibration | NAME ...]

For each config a process of its own builds the model, trains a few real steps of random tokens with the trainer's own
code and prints its peak resident memory; another predicts it. Both count from zero: imports included.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MIB = 2**20
N_STEPS = 3
GQA = {"attention": "gqa"}
EAGER: dict[str, Any] = {"compile_from_step": None}
# What the constants in hydra/runtime/memory/plan.py were fitted to.
CALIBRATION: dict[str, dict[str, Any]] = {
    "c1 debug": {},
    "c2 debug eager": EAGER,
    "c3 gqa 512 eager": {
        **GQA,
        **EAGER,
        "d_model": 512,
        "n_heads": 8,
        "n_layers": 8,
        "d_feed_forward": 2048,
        "vocab_size": 32000,
        "optimizer": "adamw",
    },
    "c4 gqa 512": {**GQA, "d_model": 512, "n_heads": 8, "n_layers": 8, "d_feed_forward": 2048, "vocab_size": 32000},
    "c5 384 eager": {**EAGER, "d_model": 384, "n_heads": 6, "n_layers": 6, "d_feed_forward": 1536},
    "c6 384 swiglu": {"d_model": 384, "n_heads": 6, "n_layers": 6, "d_feed_forward": 1024, "feed_forward": "swiglu"},
    "c7 float32 eager": {
        **GQA,
        **EAGER,
        "d_model": 256,
        "n_heads": 4,
        "n_layers": 6,
        "d_feed_forward": 1024,
        "dtype": "float32",
        "batch_size": 16,
    },
}
HELD_OUT: dict[str, dict[str, Any]] = {
    "1": {**GQA, "d_model": 384, "n_heads": 6, "n_layers": 6, "d_feed_forward": 1536},
    "2": {
        **GQA,
        **EAGER,
        "d_model": 384,
        "n_heads": 6,
        "n_layers": 6,
        "d_feed_forward": 1536,
        "batch_size": 16,
        "micro_batch_size": 8,
    },
    "3": {"d_model": 320, "n_heads": 10, "n_layers": 12, "d_feed_forward": 1280, "vocab_size": 8192},
    "4": {
        **EAGER,
        "d_model": 320,
        "n_heads": 10,
        "n_layers": 12,
        "d_feed_forward": 1280,
        "vocab_size": 8192,
        "optimizer": "adamw",
    },
    "5": {
        **GQA,
        "d_model": 768,
        "n_heads": 12,
        "n_layers": 6,
        "d_feed_forward": 3072,
        "vocab_size": 16384,
        "optimizer": "adamw",
        "attention_options": {"n_kv_heads": 4},
        "micro_batch_size": 4,
    },
    "6": {
        **GQA,
        **EAGER,
        "d_model": 768,
        "n_heads": 12,
        "n_layers": 4,
        "d_feed_forward": 2048,
        "vocab_size": 50304,
        "feed_forward": "swiglu",
        "micro_batch_size": 4,
    },
    "7": {
        "d_model": 256,
        "n_heads": 4,
        "n_layers": 8,
        "d_feed_forward": 1024,
        "context_length": 1024,
        "batch_size": 4,
        "micro_batch_size": 4,
    },
    "8": {
        **GQA,
        **EAGER,
        "d_model": 256,
        "n_heads": 4,
        "n_layers": 8,
        "d_feed_forward": 1024,
        "context_length": 1024,
        "batch_size": 4,
        "micro_batch_size": 2,
    },
    "9": {
        **GQA,
        **EAGER,
        "d_model": 256,
        "n_heads": 8,
        "n_layers": 4,
        "d_feed_forward": 1024,
        "context_length": 2048,
        "batch_size": 2,
        "micro_batch_size": 2,
        "attention_kernel": "scaled_dot_product",
        "optimizer": "adamw",
    },
    "10": {
        **GQA,
        "d_model": 512,
        "n_heads": 8,
        "n_layers": 4,
        "d_feed_forward": 2048,
        "dtype": "float32",
        "batch_size": 16,
        "micro_batch_size": 8,
        "optimizer": "adamw",
    },
    "11": {
        **EAGER,
        "d_model": 512,
        "n_heads": 8,
        "n_layers": 16,
        "d_feed_forward": 2048,
        "vocab_size": 257,
        "activation_checkpointing": "full",
        "tie_embeddings": True,
    },
    "12": {
        "d_model": 1024,
        "n_heads": 16,
        "n_layers": 8,
        "d_feed_forward": 4096,
        "vocab_size": 32000,
        "batch_size": 4,
        "micro_batch_size": 2,
    },
}


def main(names: list[str]) -> None:
    """Print one line for each config."""
    configs = CALIBRATION if names == ["calibration"] else HELD_OUT
    if names and names != ["calibration"]:
        configs = {name: fields for name, fields in (CALIBRATION | HELD_OUT).items() if name in names}
    print("| config | predicted MiB | measured MiB | ratio | above the baseline | seconds to predict |")
    print("|---|---|---|---|---|---|")
    ratios = []
    for name, fields in configs.items():
        measured, predicted = in_child("measure", fields), in_child("predict", fields)
        ratios.append(predicted["total"] / measured["peak"])
        above = (predicted["total"] - measured["baseline"]) / (measured["peak"] - measured["baseline"])
        print(
            f"| {name} | {predicted['total'] / MIB:.0f} | {measured['peak'] / MIB:.0f} | {ratios[-1]:.3f} "
            f"| {above:.3f} | {predicted['seconds']:.1f} | {json.dumps(fields)} {predicted['parts']}",
            flush=True,
        )
    print(f"ratio {min(ratios):.3f} to {max(ratios):.3f}")


def in_child(what: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The figures that a process of its own printed as its last line."""
    command = [sys.executable, __file__, what, json.dumps(fields)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def prepare(fields: dict[str, Any]) -> Any:
    """Config, choices and vocabulary of a config in this process."""
    from hydra.attention.core import choose_kernel
    from hydra.runtime.choices import Choices, choose_dtype, set_up_torch
    from scripts.config import TrainingConfig

    config = TrainingConfig.preset("debug", **fields)
    kernel, dtype = config.attention_kernel, config.dtype
    choices = Choices(
        device="cpu",
        threads=2,
        dtype=choose_dtype("cpu")[0] if dtype == "auto" else dtype,
        attention_kernel=choose_kernel("cpu", config.context_length)[0] if kernel == "auto" else kernel,
        micro_batch_size=config.micro_batch_size,
        activation_checkpointing="none" if config.activation_checkpointing == "auto" else "full",
    )
    set_up_torch(choices, 0, ROOT / "data" / "compiled")
    return config, choices, config.vocab_size


def predict(fields: dict[str, Any]) -> dict[str, Any]:
    """Predicted bytes, and the seconds that took."""
    import time

    from hydra.runtime.memory.plan import predict
    from scripts.planning import rehearse

    config, choices, vocab_size = prepare(fields)
    began = time.perf_counter()
    prediction = predict(rehearse(config, choices, vocab_size), is_compiled=config.compile_from_step is not None)
    parts = {kind: round(n / MIB) for kind, n in prediction.by_kind().items()}
    return {"total": prediction.total, "seconds": time.perf_counter() - began, "parts": parts}


def measure(fields: dict[str, Any]) -> dict[str, Any]:
    """Peak resident bytes of a process that trains N_STEPS steps, and what it had before."""
    import numpy as np
    import torch
    import torch.utils.tensorboard  # as the trainer's metrics do

    from hydra.data import Batch
    from hydra.model.framework import build_model
    from hydra.runtime.memory.host import read_own_bytes, read_peak_bytes
    from scripts.trainer import Trainer, execution_of

    config, choices, vocab_size = prepare(fields)
    baseline = read_own_bytes()
    trainer = Trainer(config, ROOT / "runs" / "nowhere")
    trainer.device = torch.device("cpu")
    trainer.assemble(build_model(config.model_spec(vocab_size), execution=execution_of(choices)), choices)
    if config.compile_from_step is not None:
        trainer.model.compile_regions()
    trainer.model.train()
    for step in range(N_STEPS):
        shape = (config.batch_size, config.context_length + 1)
        ids = np.random.default_rng(step).integers(0, vocab_size, shape)
        loss = trainer.forward_backward(Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), np.zeros_like(ids[:, 1:])))
        trainer.update_weights(loss)
    return {"peak": read_peak_bytes(), "baseline": baseline}


if __name__ == "__main__":
    if sys.argv[1:2] in (["measure"], ["predict"]):
        sys.path.insert(0, str(ROOT))
        print(json.dumps({"measure": measure, "predict": predict}[sys.argv[1]](json.loads(sys.argv[2]))))
    else:
        main(sys.argv[1:])

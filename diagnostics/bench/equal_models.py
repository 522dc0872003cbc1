"""The one shape that all contestants train, the batches they train on, and what a step of it costs."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diagnostics.bench.machine import ROOT
from hydra.data import prepare_dataset
from scripts.config import TrainingConfig

LEARNING_RATE = 1e-3
N_BATCHES = 64


@dataclass(frozen=True)
class Shape:
    """A decoder of L layers and width D over T tokens; every contestant has 12 D^2 weights a layer."""

    vocab_size: int = 4096
    n_layers: int = 6
    d_model: int = 384
    n_heads: int = 6
    n_tokens: int = 256
    n_rows: int = 16

    @property
    def d_gated_feed_forward(self) -> int:
        """Inner width of a gated network (three matrices) with the weights of 8 D^2."""
        return 8 * self.d_model // 3

    @property
    def matmul_flops_per_token(self) -> int:
        """6 N_mm + 6 L D T: weights that multiply, head included; causal scores counted once (forward and backward)."""
        n_weights = 12 * self.n_layers * self.d_model**2 + self.vocab_size * self.d_model
        return 6 * n_weights + 6 * self.n_layers * self.d_model * self.n_tokens

    @property
    def tokens_per_step(self) -> int:
        """Of every contestant."""
        return self.n_rows * self.n_tokens

    def gemm_shapes(self) -> list[tuple[int, int, int]]:
        """Rows, inner and columns of the products that a step consists of."""
        n, d = self.tokens_per_step, self.d_model
        return [(n, d, d), (n, d, 4 * d), (n, 4 * d, d), (n, d, min(self.vocab_size, 4096))]

    def hydra_config(self, data_dir: str, **fields: object) -> dict[str, Any]:
        """HYDRA's config of this shape: multi-head attention, squared ReLU, AdamW, as the peers have it."""
        return {
            "data_dir": data_dir,
            "vocab_size": self.vocab_size,
            "d_model": self.d_model,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "attention": "gqa",
            "attention_options": {"n_kv_heads": self.n_heads},
            "d_feed_forward": 4 * self.d_model,
            "zero_init": False,
            "context_length": self.n_tokens,
            "batch_size": self.n_rows,
            "micro_batch_size": self.n_rows,
            "optimizer": "adamw",
            "learning_rate": LEARNING_RATE,
            "max_steps": 100_000,
            "warmup_steps": 0,
            "decay_fraction": 0.0,
            "compile_from_step": 0,
            "eval_every": 10**6,
            "checkpoint_every": 10**6,
            "sample_tokens": 0,
            **fields,
        }


def write_batches(shape: Shape, data_dir: str) -> Path:
    """The global batches that HYDRA's trainer takes in this order, [steps, rows, tokens + 1], for the peers to read."""
    config = TrainingConfig.preset("debug", **shape.hydra_config(data_dir))
    dataset = prepare_dataset(config.data_spec(), ROOT / data_dir, ROOT)
    steps = [
        dataset.train_batch(step, seed=config.seed, n_rows=shape.n_rows, n_tokens=shape.n_tokens)
        for step in range(N_BATCHES)
    ]
    rows = [np.concatenate([batch.inputs_BT, batch.targets_BT[:, -1:]], axis=1) for batch in steps]
    path = Path(tempfile.mkdtemp(prefix="bench-batches-")) / "batches.npy"
    np.save(path, np.stack(rows).astype(np.int32))
    return path


def peer_spec(shape: Shape, batches: Path, threads: int) -> dict[str, Any]:
    """What a contestant is told on its command line."""
    return {
        "threads": threads,
        "gemm_shapes": shape.gemm_shapes(),
        "batches": str(batches),
        "vocab_size": shape.vocab_size,
        "n_layers": shape.n_layers,
        "d_model": shape.d_model,
        "d_gated_feed_forward": shape.d_gated_feed_forward,
        "n_heads": shape.n_heads,
        "n_tokens": shape.n_tokens,
        "n_rows": shape.n_rows,
        "learning_rate": LEARNING_RATE,
    }

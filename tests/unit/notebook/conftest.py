"""Run directories written by hand."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from hydra.notebook.plan import Plan
from hydra.runtime import Run, RunStatus

HOSTILE = "<script>alert('x')</script><img src=http://example.org/x.png onerror=alert(1)>"


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """make_run(status, n_records): a run directory with a metrics row for every step, hostile strings everywhere."""

    def make(status: RunStatus, n_records: int = 50) -> Run:
        run_dir = tmp_path / "runs" / "job"
        run_dir.mkdir(parents=True)
        rows = [
            {
                "step": step,
                "tokens": step * 10,
                "loss_nats": 5.0 - step / n_records,
                "learning_rate": 1e-3,
                "grad_norm": 1.0 + step % 3,
                "tokens_per_s": 12_345.0,
                "step_ms": 10.0,
                "peak_mem_mib": 100.0,
                "elapsed_s": step / 100,
            }
            for step in range(1, n_records + 1)
        ]
        last = {"step": n_records, "val_loss_nats": 3.5, "val_bits_per_byte": 1.462, "elapsed_s": 1.0}
        first = {"step": 0, "val_loss_nats": 8.0, "val_bits_per_byte": 8.0, "elapsed_s": 0.0}
        files = {
            "config.json": json.dumps({"sample_prompt": HOSTILE, "max_steps": 50}),
            "state.json": json.dumps(asdict(status)),
            "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in [first, *rows, last]),
            "samples.jsonl": json.dumps({"step": 50, "prompt": "def ", "text": HOSTILE}) + "\n",
            "trainer.log": f"first line\n{HOSTILE}\n",
            "data.json": json.dumps(
                {
                    "corpus": {"names": [HOSTILE], "n_documents": 40, "n_bytes": 20_400_000, "sha256": "a" * 64},
                    "tokenizer": {"kind": "bpe", "vocab_size": 4096, "sha256": "b" * 64},
                    "splits": {
                        "train": {"n_documents": 39, "n_bytes": 20_000_000, "n_tokens": 5_000_000, "sha256": "c" * 64},
                        "validation": {"n_documents": 1, "n_bytes": 400_000, "n_tokens": 100_000, "sha256": "d" * 64},
                    },
                    "yardsticks": {
                        "unigram_bits_per_byte": 3.1,
                        "bigram_bits_per_byte": 1.89,
                        "gzip_9_bits_per_byte": 1.77,
                        "xz_9_bits_per_byte": 1.45,
                    },
                }
            ),
            "environment.json": json.dumps(
                {
                    "resolved": {"device": "cpu"},
                    "sessions": [
                        {
                            "started_at": 1.7e9,
                            "python": "3.11",
                            "gpu": None,
                            "git_commit": "f00d",
                            "git_dirty": True,
                            "packages": {"torch": "2.13.0"},
                        }
                    ],
                }
            ),
        }
        for name, text in files.items():
            (run_dir / name).write_text(text)
        return Run(run_dir)

    return make


@pytest.fixture
def done_status() -> RunStatus:
    return RunStatus(
        status="done",
        stage="done",
        step=50,
        max_steps=50,
        tokens=500,
        restarts=2,
        started_at=time.time(),
        train_s=125.0,
        train_flops=1.5e15,
        n_parameters=4_000_000,
        val_loss_nats=3.5,
        val_bits_per_byte=1.462,
    )


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(
        run_dir=tmp_path / "runs" / "job",
        notebook_name="job",
        question=f"Does it learn? {HOSTILE}",
        command="papermill job.ipynb runs/job/job.ipynb --engine hydra -r sample_prompt '<b>'",
        config={"sample_prompt": HOSTILE},
        differences={"sample_prompt": (HOSTILE, HOSTILE)},
    )

"""What does a step cost more while Weights & Biases cannot be reached, from the first step of a run to its last?

    python -m diagnostics.tracking_cost [ROUNDS [STEPS]]

Whole runs of the same small model, one after the other: without W&B; with a server that refuses connections; with one
that takes them and never answers. Rounds go there and back, so that a machine that slows down meets all alike. A step's
time is that in metrics.jsonl. A ratio is of one round, and the figure is the median over rounds; it counts only if all
runs have the same losses.
"""

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from diagnostics.bench.machine import ROOT, describe
from hydra.runtime import Run
from scripts.config import TrainingConfig
from scripts.launch import write_config_once

MAX_RATIO = 1.01
WITHOUT, REFUSING, SILENT = "without W&B", "W&B refuses", "W&B is silent"


@contextlib.contextmanager
def servers() -> Iterator[dict[str, str | None]]:
    """What each kind of run is told W&B's address is; None: it has no W&B."""
    with socket.create_server(("127.0.0.1", 0)) as refusing:
        closed_port = refusing.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as silent:
        yield {
            WITHOUT: None,
            REFUSING: f"http://127.0.0.1:{closed_port}",
            SILENT: f"http://127.0.0.1:{silent.getsockname()[1]}",
        }


def train(run_dir: Path, url: str | None, n_steps: int) -> tuple[list[float], list[float]]:
    """Train a whole run; milliseconds and losses of its steps."""
    config = TrainingConfig.preset(
        "debug",
        corpus=str(ROOT / "tests" / "assets" / "notes"),
        data_dir=str(run_dir.parent / "data"),
        tokenizer="bytes",
        max_steps=n_steps,
        warmup_steps=1,
        log_every=1,
        eval_every=n_steps,
        checkpoint_every=n_steps,
        sample_tokens=0,
        compile_from_step=None,
        wandb_mode="disabled" if url is None else "online",
    )
    write_config_once(config, run_dir)
    environment = {**os.environ, "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": url or ""}
    with (run_dir / "trainer.log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "scripts.trainer", str(run_dir)], cwd=ROOT, env=environment, stderr=log, check=True
        )
    steps = [record for record in Run.open(run_dir).metrics() if "step_ms" in record]
    return [float(str(step["step_ms"])) for step in steps], [float(str(step["loss_nats"])) for step in steps]


def main(arguments: list[str]) -> int:
    """Measure and print; returns 1 where the cost is above MAX_RATIO or losses differ."""
    n_rounds, n_steps = (int(text) for text in [*arguments, *("4", "800")[len(arguments) :]])
    print(describe())
    means: dict[str, list[float]] = {}
    losses = []
    with tempfile.TemporaryDirectory() as folder, servers() as urls:
        for round_ in range(n_rounds):
            for kind in list(urls)[:: -1 if round_ % 2 else 1]:
                milliseconds, of_run = train(Path(folder, f"{kind}-{round_}".replace(" ", "-")), urls[kind], n_steps)
                means.setdefault(kind, []).append(statistics.fmean(milliseconds))
                losses.append(of_run)
    if any(of_run != losses[0] for of_run in losses):
        print("losses must be the same in all runs, but are not: no figure")
        return 1
    print(f"{n_rounds} rounds of {n_steps} steps; ms are means over a run's steps, medians over rounds\n")
    print("| run | step, ms | times that without W&B |\n|---|---|---|")
    ratios = {
        kind: statistics.median(mine / theirs for mine, theirs in zip(means[kind], means[WITHOUT], strict=True))
        for kind in means
    }
    for kind, ratio in ratios.items():
        print(f"| {kind} | {statistics.median(means[kind]):.2f} | {ratio:.4f} |")
    print(f"\ngoal at most {MAX_RATIO}: {'holds' if max(ratios.values()) <= MAX_RATIO else 'MISSED'}")
    return int(max(ratios.values()) > MAX_RATIO)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

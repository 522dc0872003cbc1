"""From the start of the process to the first optimizer step, and to the first step of compiled code, cache warm."""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from diagnostics.bench.machine import ROOT, wait_until_quiet
from hydra.runtime.paths import METRICS
from hydra.runtime.records import read_records
from scripts.config import TrainingConfig
from scripts.launch import write_config_once

N_STARTS = 5
LIMIT_S = 120.0


def run(data_dir: str, threads: int) -> dict[str, Any]:
    """Start the trainer on the debug preset's model, over a corpus whose validation text is short, several times."""
    fields = {
        "corpus": str(ROOT / "tests" / "assets" / "notes"),
        "tokenizer": "bytes",
        "data_dir": data_dir,
        "threads": threads,
        "log_every": 1,
        "sample_tokens": 0,
        "compile_from_step": 1,
        "warmup_steps": 0,
        "max_steps": 2,
    }
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for start in range(N_STARTS + 1):
        run_dir = Path(tempfile.mkdtemp()) / "run"
        write_config_once(TrainingConfig.preset("debug", **fields), run_dir)
        wait_until_quiet()
        reached = _seconds_to_steps(run_dir)
        if start:  # the first one fills the caches
            for step, after in reached.items():
                seconds[step].append(after)
    return {"first_step_s": seconds[1], "first_compiled_step_s": seconds[2]}


def _seconds_to_steps(run_dir: Path) -> dict[int, float]:
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.trainer", str(run_dir)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    reached: dict[int, float] = {}
    while len(reached) < 2:
        now = time.perf_counter() - began
        if now > LIMIT_S or (process.poll() is not None and process.returncode != 0):
            raise RuntimeError(f"the trainer must take two steps within {LIMIT_S} s, but has not; see {run_dir}")
        for record in read_records(run_dir / METRICS):
            if "loss_nats" in record:
                reached.setdefault(record["step"], now)
        time.sleep(0.005)
    process.wait()
    return reached


def table(result: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        "`python -m scripts.trainer` on the debug preset's model, interpreter and imports included, memory plan and "
        "compiler's cache warm.",
        "",
        "| process start to | seconds (median of 5) | all |",
        "|---|---|---|",
    ]
    for title, key in (("first optimizer step", "first_step_s"), ("first compiled step", "first_compiled_step_s")):
        every = " ".join(f"{value:.2f}" for value in result[key])
        lines.append(f"| {title} | {statistics.median(result[key]):.2f} | {every} |")
    return lines

"""SIGKILL for papermill, its kernel or the trainer, at moments that no test chooses; the same command then finishes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hydra.runtime import Run

ROOT = Path(__file__).parents[2]
FIELDS = {"max_steps": 500, "checkpoint_every": 40, "eval_every": 100, "log_every": 10}
# From the first import of papermill to the middle of training, on a quiet machine; later on a busy one.
LATEST_S = 8.0


def command(run_dir: Path, corpus_dir: Path, data_dir: Path) -> list[str]:
    """The README's command, with another output path and parameters."""
    arguments = ["-p", "preset", "tiny", "-p", "threads", "1", "-r", "run_dir", str(run_dir)]
    for name, value in FIELDS.items():
        arguments += ["-p", name, str(value)]
    arguments += ["-r", "corpus", str(corpus_dir), "-r", "data_dir", str(data_dir)]
    papermill = Path(sys.executable).with_name("papermill")
    return [
        str(papermill),
        "notebooks/pretrain.ipynb",
        str(run_dir / "pretrain.ipynb"),
        "--engine",
        "hydra",
        *arguments,
    ]


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def processes_of(run_dir: Path) -> Iterator[tuple[int, str]]:
    """Living processes of the run: those that name it on the command line or got it from the engine."""
    needle = str(run_dir).encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command_line = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if b"HYDRA_ENGINE_RUN_DIR=" + needle in environment and b"ipykernel" in command_line:
            yield int(entry.name), "kernel"
        elif needle in command_line and b"scripts.trainer" in command_line:
            yield int(entry.name), "trainer"
        elif needle in command_line and b"papermill" in command_line:
            yield int(entry.name), "papermill"


@pytest.mark.parametrize("victim", ["kernel", "papermill", "trainer"])
def test_killed_at_a_random_moment(
    victim: str,
    tmp_path: Path,
    corpus_dir: Path,
    shared_data_dir: Path,
    make_run: Callable[..., Path],
    start_trainer: Callable[[Path], "subprocess.Popen[str]"],
    weights_hash: Callable[[Path], str],
    figures: Callable[[Path], list[dict[str, object]]],
    moments: random.Random,
) -> None:
    uninterrupted = make_run("uninterrupted", **FIELDS)
    assert start_trainer(uninterrupted).wait(timeout=120) == 0

    run_dir = tmp_path / "runs" / "killed"
    arguments = command(run_dir, corpus_dir, shared_data_dir)
    n_kills = 0
    for _ in range(40):
        process = start(arguments)
        moment = time.monotonic() + moments.uniform(0.5, LATEST_S)
        # The victim may come to life later than the moment, and be gone again before it: then the job just ends.
        pids: list[int] = []
        while process.poll() is None and not (time.monotonic() > moment and pids):
            time.sleep(0.02)
            pids = [pid for pid, role in processes_of(run_dir) if role == victim]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        killed = bool(pids) and process.returncode != 0
        n_kills += killed
        if killed:
            assert process.returncode == (-signal.SIGKILL if victim == "papermill" else 75), output
        deadline = time.monotonic() + 10
        while remaining := list(processes_of(run_dir)):
            assert time.monotonic() < deadline, remaining
            time.sleep(0.1)
        if (run_dir / "config.json").exists():
            status = Run.open(run_dir).status()
            assert not status.is_alive
            assert killed or status.status == "done", output
        if n_kills == 2:
            break
        if not killed:  # the moment came too late: another run gets another one
            shutil.rmtree(run_dir)
            n_kills = 0

    assert n_kills == 2
    finished = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "report.html" in finished.stdout
    assert weights_hash(run_dir) == weights_hash(uninterrupted)
    assert figures(run_dir) == figures(uninterrupted)
    assert Run.open(run_dir).status().status == "done"
    notebook = json.loads((run_dir / "pretrain.ipynb").read_text())
    assert notebook["metadata"]["papermill"]["exception"] is None
    assert {cell["metadata"]["papermill"]["status"] for cell in notebook["cells"]} == {"completed"}
    assert not list(processes_of(run_dir))

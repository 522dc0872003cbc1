"""Real trainers under real signals and damage: what the tests of resumption and `diagnostics/storm.py` share.

A trainer is the README's command, `python -m scripts.trainer RUN_DIR`, in a process group of its own.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.runtime import Run, paths
from hydra.runtime.checkpoint import list_checkpoints, step_of
from hydra.runtime.records import read_records

ROOT = Path(__file__).parents[2]
TRAINER = "scripts.trainer"
TIMEOUT_S = 240.0
AT_WORK = ("training", "evaluating", "writing a checkpoint")
MEASURED = ("tokens_per_s", "step_ms", "peak_mem_mib", "elapsed_s")
"""Figures of metrics.jsonl that the clock and the machine decide."""
PAGE_BYTES = 4096
# Several epochs of the tests' small corpus, accumulation, and a checkpoint that shares no factor with evaluations.
LONG: dict[str, Any] = {
    "max_steps": 400,
    "batch_size": 6,
    "micro_batch_size": 2,
    "checkpoint_every": 7,
    "eval_every": 50,
    "log_every": 1,
}
# Compiled code takes over in the middle of the run; kills come before and after.
FAST: dict[str, Any] = {**LONG, "optimizer": "muon", "dtype": "bfloat16", "compile_from_step": 30}
RUNS: dict[str, dict[str, Any]] = {
    "plain": LONG,
    "blocked": {**FAST, "attention_kernel": "blocked", "checkpoints_in_background": True},
    "tiled": {**FAST, "attention_kernel": "tiled"},
}
"""Fields of the runs that are killed, beside those of the preset `tiny`."""
Faults = Sequence[dict[str, Any]]
Damage = Callable[[Path, random.Random], None]


class StormError(AssertionError):
    """Something that must survive did not."""


# -------------------------------------------------------------------- processes


def start_trainer(run_dir: Path, faults: Faults = (), program: str = TRAINER) -> "subprocess.Popen[str]":
    """Start the trainer, or another program, on `run_dir`; under `faults` by their launcher, hydra.testing.faults."""
    return subprocess.Popen(
        [sys.executable, "-m", *arguments(run_dir, faults, program)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whoever started us under nohup did not mean it for the trainer.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


def arguments(run_dir: Path, faults: Faults = (), program: str = TRAINER) -> list[str]:
    """What `python -m` needs to train the run, under `faults` by their launcher."""
    if not faults:
        return [program, str(run_dir)]
    with tempfile.NamedTemporaryFile("w", suffix=".json", dir=run_dir.parent, delete=False) as file:
        json.dump(list(faults), file)
    return ["hydra.testing.faults", file.name, program, str(run_dir)]


def finish(run_dir: Path, faults: Faults = (), status: int = 0, program: str = TRAINER) -> str:
    """Run the trainer (or another program) to its end; returns what it wrote to stderr.

    Raises:
        StormError: it does not end with `status`.
    """
    process = start_trainer(run_dir, faults, program)
    try:
        _, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        kill_group(process)
    if process.returncode != status:
        raise StormError(f"{run_dir} must end with status {status}, but ended with {process.returncode}:\n{errors}")
    return errors


def kill_group(process: "subprocess.Popen[str]", number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to the process and its children, unless it has ended and was waited for."""
    if process.poll() is None:
        os.killpg(process.pid, number)


def wait_until(process: "subprocess.Popen[str]", run_dir: Path, stages: Sequence[str] = ()) -> None:
    """Return once `process` owns the run (and is in one of `stages`), or has ended."""
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None:
        state = Run.open(run_dir).status()
        if state.pid == process.pid and state.is_alive and (not stages or state.stage in stages):
            return
        if time.monotonic() > deadline:
            kill_group(process)
            raise StormError(f"{run_dir} must train within {TIMEOUT_S} s, but is at {state.stage}")
        time.sleep(0.01)


def cut_off_after(run_dir: Path, step: int) -> None:
    """Make a finished run one that was cut off after its checkpoint of `step`."""
    for directory in list_checkpoints(run_dir):
        if step_of(directory) > step:
            shutil.rmtree(directory)
    state = paths.read_json(run_dir / paths.STATE)
    paths.write_json(run_dir / paths.STATE, {**state, "status": "interrupted", "step": step})


def kill_until_done(run_dir: Path, n_kills: int, moments: random.Random) -> list[int]:
    """Kill the run again and again, each time 0 to 0.8 s after it began to train, and let it finish after `n_kills`.

    Returns:
        The newest checkpoint's step at each kill; fewer than `n_kills` when the run ended between them.
    """
    steps: list[int] = []
    while len(steps) < n_kills:
        process = start_trainer(run_dir)
        wait_until(process, run_dir, AT_WORK)
        time.sleep(moments.uniform(0.0, 0.8))
        kill_group(process)
        _, errors = process.communicate()
        if process.returncode == 0:
            return steps
        if process.returncode != -signal.SIGKILL:
            raise StormError(f"{run_dir} must go on by itself, but ended with {process.returncode}:\n{errors}")
        if Run.open(run_dir).status().status != "interrupted":
            raise StormError(f"{run_dir} was killed, but is called {Run.open(run_dir).status().status}")
        steps.append(newest_step(run_dir))
    finish(run_dir)
    return steps


def stop_at_random(run_dir: Path, signals: Sequence[str], moments: random.Random) -> int:
    """Send the signals to the run 0 to 0.8 s after its trainer owns it, or after it trains; a SIGKILL 2 s later.

    Returns:
        Steps that were lost: between the last one that it computed and its newest checkpoint; -1 when the run was done
        before the signal came.
    """
    process = start_trainer(run_dir)
    wait_until(process, run_dir, moments.choice(((), AT_WORK, AT_WORK)))
    time.sleep(moments.uniform(0.0, 0.8))
    for name in signals:
        if name == "SIGKILL":
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2.0)
        kill_group(process, signal.Signals[name])
    _, errors = process.communicate(timeout=TIMEOUT_S)
    if process.returncode == 0:
        return -1
    if "SIGKILL" not in signals or process.returncode != -signal.SIGKILL:
        status = Run.open(run_dir).status()
        said = (process.returncode, status.status, status.cause)
        if said != (os.EX_TEMPFAIL, "interrupted", signals[0]):
            raise StormError(f"{signals} must end a run with status {os.EX_TEMPFAIL}, but got {said}:\n{errors}")
    return max((record["step"] for record in read_records(run_dir / paths.METRICS)), default=0) - newest_step(run_dir)


# -------------------------------------------------------------------- what a run left


def newest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint by name; 0 where there is none."""
    return max(map(step_of, list_checkpoints(run_dir)), default=0)


def weights_hash(run_dir: Path) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor in the newest checkpoint, and its step."""
    from safetensors.torch import load_file

    directory = list_checkpoints(run_dir)[-1]
    digest = hashlib.sha256(directory.name.encode())
    for group in ("model", "optimizer", "rng"):
        for name, tensor in sorted(load_file(directory / f"{group}.safetensors").items()):
            digest.update(f"{group}/{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without what the clock and the machine decide."""
    records = map(json.loads, (run_dir / paths.METRICS).read_text().splitlines())
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]


def differences(run_dir: Path, undisturbed: Path) -> list[str]:
    """In what a finished run differs from the undisturbed one: weights, figures, samples, skipped steps, status."""
    same = {
        "weights": weights_hash(run_dir) == weights_hash(undisturbed),
        "figures": figures(run_dir) == figures(undisturbed),
        paths.SAMPLES: (run_dir / paths.SAMPLES).read_text() == (undisturbed / paths.SAMPLES).read_text(),
        paths.SKIPPED: (run_dir / paths.SKIPPED).read_text() == (undisturbed / paths.SKIPPED).read_text(),
        "status": Run.open(run_dir).status().status == "done",
    }
    return [name for name, is_same in same.items() if not is_same]


def non_finite_tensors(run_dir: Path) -> list[str]:
    """Tensors in any checkpoint of the run, damaged ones too, that hold NaN or infinity."""
    from safetensors.torch import load_file

    return [
        f"{path.parent.name}/{path.name}: {name}"
        for path in sorted((run_dir / paths.CHECKPOINTS).glob("*/*.safetensors"))
        for name, tensor in load_file(path).items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]


# -------------------------------------------------------------------- damage


def set_age(directory: Path, age_s: float) -> None:
    """Let the clock of the file system say that it was written so long ago."""
    then = time.time() - age_s
    os.utime(directory, (then, then))


def flip_bit(path: Path, moments: random.Random) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    bit = moments.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def truncate(path: Path, moments: random.Random) -> None:
    """Keep the beginning alone."""
    os.truncate(path, moments.randrange(path.stat().st_size))


def empty(path: Path, moments: random.Random) -> None:
    """Keep the name alone."""
    os.truncate(path, 0)


def cut_last_byte(path: Path, moments: random.Random) -> None:
    """Keep all but one byte."""
    os.truncate(path, path.stat().st_size - 1)


def zero_page(path: Path, moments: random.Random) -> None:
    """Overwrite one page with zeros, one that is not all zeros."""
    content = bytearray(path.read_bytes())
    starts = [s for s in range(0, len(content), PAGE_BYTES) if any(content[s : s + PAGE_BYTES])]
    start = moments.choice(starts)
    stop = min(start + PAGE_BYTES, len(content))
    content[start:stop] = bytes(stop - start)
    path.write_bytes(content)


def delete(path: Path, moments: random.Random) -> None:
    """Remove it."""
    path.unlink()


def swap(path: Path, moments: random.Random) -> None:
    """Change names with another file of its folder that holds something else."""
    others = [p for p in sorted(path.parent.iterdir()) if p.is_file() and p.read_bytes() != path.read_bytes()]
    other = moments.choice(others)
    between = path.with_name("between")
    os.rename(path, between)
    os.rename(other, path)
    os.rename(between, other)


DAMAGES: tuple[Damage, ...] = (flip_bit, empty, truncate, cut_last_byte, zero_page, delete, swap)
"""What storage does to files: each is tried on each."""


def every_damage(directory: Path) -> Iterator[tuple[str, Damage]]:
    """Each file of `directory` with each damage."""
    for path in sorted(directory.iterdir()):
        for damage in DAMAGES:
            yield path.name, damage

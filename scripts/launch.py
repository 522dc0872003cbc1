"""Starting the trainer as a process of its own, from a notebook or from Python."""

import os
import sys
import time
from pathlib import Path

from hydra.attention.code import write_copies
from hydra.errors import RunCutOffError, RunError
from hydra.runtime import Run, paths, workspace_root
from hydra.runtime.processes import ProcessIdentity, is_batch, start_process
from scripts.config import JobConfig, refuse_changed_config

START_TIMEOUT_S = 180.0  # importing torch from a cold network disk takes its time


def launch(config: JobConfig, run_dir: str | Path) -> Run:
    """Start the trainer, or the comparer, on `run_dir` and return once it owns it; attach where one is at work already.

    A finished run is returned as it is. In a batch run (under the engine) the trainer is stopped with a checkpoint
    when this process ends; otherwise it is detached and goes on.

    Raises:
        RunError: the directory holds another config, or the trainer did not start (with the end of its log).
        RunCutOffError: the trainer was ended from outside before it owned the run.
    """
    directory = (workspace_root() / run_dir).resolve()
    write_config_once(config, directory)
    run = Run.open(directory)
    if run.status().status in ("done", "running"):
        return run
    process = start_process(
        [sys.executable, "-m", config.module, str(directory)],
        working_dir=workspace_root(),
        log=directory / paths.LOG,
        dies_with_caller=is_batch(),
    )
    identity = ProcessIdentity.of(process.pid)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        status = run.status()
        if status.is_alive or (identity is not None and status.owner == identity):
            return run
        if process.poll() is not None:
            if process.returncode < 0 or process.returncode == os.EX_TEMPFAIL:
                raise RunCutOffError(
                    f"the trainer was ended (status {process.returncode}) before it began; give the same command again"
                )
            raise RunError(
                f"{config.module} must start, but ended with status {process.returncode}:\n{run.log_tail(20)}"
            )
        time.sleep(0.05)
    raise RunError(f"{config.module} must own {directory} within {START_TIMEOUT_S} s; see {directory / paths.LOG}")


def write_config_once(config: JobConfig, run_dir: Path) -> None:
    """Make `run_dir` a run of `config`, unless it is one already.

    Raises:
        RunError: it is a run of another config.
    """
    refuse_changed_config(config, run_dir)
    if not (run_dir / paths.CONFIG).is_file():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_copies(config.attention_code, run_dir / paths.CODE)  # before the config: from then on it is a run
        paths.write_atomically(run_dir / paths.CONFIG, config.to_json())

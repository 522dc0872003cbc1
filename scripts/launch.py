"""Starting the trainer as a process of its own, from a notebook or from Python."""

import json
import os
import sys
import time
from pathlib import Path

from hydra.attention.code import write_copies
from hydra.errors import ConfigError, RunCutOffError, RunError
from hydra.runtime import Run, paths, workspace_root
from hydra.runtime.disk import raising_disk_full
from hydra.runtime.processes import ProcessIdentity, is_batch, start_process
from hydra.runtime.secrets import refuse_secrets
from hydra.runtime.sums import update_sums
from hydra.runtime.tracking import check_installed
from scripts.config import JobConfig, TrainingConfig, refuse_changed_config

START_TIMEOUT_S = 180.0  # importing torch from a cold network disk takes its time


@raising_disk_full()
def launch(config: JobConfig, run_dir: str | Path) -> Run:
    """Start the trainer, or the comparer, on `run_dir` and return once it owns it; attach where one is at work already.

    A finished run is returned as it is. In a batch run (under the engine) the trainer is stopped with a checkpoint
    when this process ends; otherwise it is detached and goes on.

    Raises:
        ConfigError: `config` is none, or `run_dir` no path of a run.
        RunError: the directory holds another config, or the trainer did not start (with the end of its log).
        RunCutOffError: the trainer was ended from outside before it owned the run.
    """
    if not hasattr(type(config), "module"):  # without an import of comparisons, which would delay every trainer
        raise ConfigError(
            f"launch() needs a config, such as TrainingConfig.preset('debug'), but got {type(config).__name__}"
        )
    directory = paths.resolve_run_dir(run_dir)
    write_config_once(config, directory)
    run = Run.open(directory)
    status = run.status()
    if status.status == "running" or (status.status == "done" and config.is_met_by(status.step)):
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
    """Make `run_dir` a run of `config`, unless it is one already; what the config allows to change is changed.

    Raises:
        RunError: it is a run of another config, or at work while it is to change, or a link leads out of it.
        ConfigError: the config holds a secret, or asks a new run for a package that is not installed.
    """
    paths.refuse_links_out(run_dir)
    refuse_secrets(json.loads(config.to_json()))
    refuse_changed_config(config, run_dir)
    path = run_dir / paths.CONFIG
    if not path.is_file():
        if isinstance(config, TrainingConfig):
            check_installed(config.wandb_mode)
        run_dir.mkdir(parents=True, exist_ok=True)
        # Before the config: from then on it is a run.
        write_copies(config.attention_code, run_dir / paths.CODE, paths.write_atomically)
    elif not config.differences(type(config).from_json(path.read_text())):
        return
    elif Run.open(run_dir).status().is_alive:
        raise RunError(f"a run must not be at work while its config changes, but {run_dir} is; stop it first")
    paths.write_atomically(path, config.to_json())
    update_sums(path)

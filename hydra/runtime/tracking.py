"""The trainer's side of Weights & Biases (W&B): it starts the process that follows the run, and ends it."""

import importlib.util
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Literal

from hydra.errors import ConfigError
from hydra.runtime import paths
from hydra.runtime.processes import start_process

logger = logging.getLogger(__name__)
TrackingMode = Literal["disabled", "offline", "online"]

# After the trainer's last word, for what W&B does not have by then.
FLUSH_S = 5.0
# The process leaves by itself after FLUSH_S; it is killed when it does not.
LEAVE_S = 2.0
EXIT_SENT, EXIT_UNSENT = 0, 1
SENDER = "hydra.runtime.send_to_wandb"


def check_installed(mode: TrackingMode) -> None:
    """Return if what `mode` needs is installed.

    Raises:
        ConfigError: it needs the package wandb, and there is none.
    """
    if mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"wandb_mode {mode!r} needs the package wandb, but it is not installed; install requirements.lock, or give "
            'wandb_mode "disabled"'
        )


def advice(run_dir: Path, mode: TrackingMode, project: str) -> str:
    """The command that hands to W&B what it lacks of the run, at any time."""
    root = paths.workspace_root()
    shown = run_dir.relative_to(root) if run_dir.is_relative_to(root) else run_dir
    return shlex.join(["python", "-m", SENDER, str(shown), mode, project])


class Tracker:
    """The trainer's hold on the process that follows its run. Nothing of it waits for W&B, but `close` for seconds."""

    def __init__(self, run_dir: Path, mode: TrackingMode, project: str) -> None:
        """Start the process; the calling one must own the run's ledger."""
        self._advice = advice(run_dir, mode, project)
        self._process = start_process(
            [sys.executable, "-m", SENDER, str(run_dir), mode, project, str(os.getpid())],
            working_dir=paths.workspace_root(),
            log=run_dir / paths.LOG,
            dies_with_caller=False,  # it notices, and has some seconds to hand over the last records
        )

    def close(self) -> None:
        """Wait, for FLUSH_S + LEAVE_S seconds at most, until W&B has everything. The ledger must be finished."""
        try:
            status = self._process.wait(FLUSH_S + LEAVE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        if status != EXIT_SENT:
            logger.warning(
                "W&B did not get all of this run's metrics (its process ended with status %d). They are complete in "
                "%s; to send what is missing: %s",
                status,
                paths.METRICS,
                self._advice,
            )

"""`Run`: what a notebook, a report or a colleague knows of a run. It reads the run directory and never owns it."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hydra.errors import CheckpointError, RunCutOffError, RunError
from hydra.runtime import paths
from hydra.runtime.checkpoint import load_checkpoint, newest_whole
from hydra.runtime.ledger import RunStatus, read_status
from hydra.runtime.memory import MemoryPlan
from hydra.runtime.memory.plan import read_plan
from hydra.runtime.records import read_records
from hydra.runtime.sums import read_sums

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import nn

    Model = TypeVar("Model", bound=nn.Module)


class Run:
    """A run directory, read anew at every call, whoever trains it and wherever it has been moved to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.name = directory.name

    @classmethod
    def open(cls, run_dir: str | Path) -> "Run":
        """The run in `run_dir` (relative to the workspace root).

        Raises:
            RunError: there is no `config.json` in it, or a link leads out of it.
            ConfigError: the path leads out of the workspace.
        """
        directory = paths.resolve_run_dir(run_dir)
        if not (directory / paths.CONFIG).is_file():
            raise RunError(
                f"a run directory must hold {paths.CONFIG}, but {directory} does not; start one with launch()"
            )
        paths.refuse_links_out(directory)
        return cls(directory)

    def __repr__(self) -> str:
        status = self.status()
        return f"Run({self.name}: {status.status}, {status.unit} {status.step} of {status.max_steps})"

    def status(self) -> RunStatus:
        """Where the run stands, reconciled with what is alive."""
        return read_status(self.directory)

    def config(self) -> dict[str, object]:
        """The config as it was resolved when the run began."""
        return paths.read_json(self.directory / paths.CONFIG)

    def metrics(self) -> list[dict[str, object]]:
        """The records of `metrics.jsonl`, oldest first; keys carry their units."""
        return read_records(self.directory / paths.METRICS)

    def samples(self) -> list[dict[str, object]]:
        """Text written by the model during the run: step, prompt, text."""
        return read_records(self.directory / paths.SAMPLES)

    def manifest(self) -> dict[str, object]:
        """The data manifest: corpus, tokenizer, splits, yardsticks."""
        return paths.read_json(self.directory / paths.MANIFEST)

    def memory_plan(self) -> MemoryPlan | None:
        """How the run was cut to fit its memory; None before that was planned."""
        return read_plan(self.directory)

    def environment(self) -> dict[str, object]:
        """Choices resolved at the first start, and the machine and versions of every session."""
        return paths.read_json(self.directory / paths.ENVIRONMENT)

    def log_tail(self, n_lines: int) -> str:
        """The last lines of `trainer.log`."""
        try:
            return "\n".join((self.directory / paths.LOG).read_text(errors="replace").splitlines()[-n_lines:])
        except FileNotFoundError:
            return ""

    def stop(self, timeout_s: float = 30.0) -> RunStatus:
        """Ask the trainer to write a checkpoint and end (SIGTERM), and wait until it has.

        Raises:
            RunError: it runs on another machine, or is still alive after `timeout_s`.
        """
        status = self.status()
        if not status.is_alive or status.owner is None:
            return status
        if not status.owner.is_here():
            raise RunError(f"run {self.name} is trained on {status.owner.host}; stop it there")
        with contextlib.suppress(ProcessLookupError):  # it may end by itself just now
            os.kill(status.owner.pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while status.owner.is_alive():
            if time.monotonic() > deadline:
                raise RunError(f"process {status.owner.pid} must end within {timeout_s} s of SIGTERM, but it has not")
            time.sleep(0.05)
        return self.status()

    def raise_for_status(self) -> None:
        """Return if the run is done.

        Raises:
            RunCutOffError: it was interrupted.
            RunError: it is not done for another reason. The message says what happened and what to do.
        """
        status = self.status()
        if status.status == "done":
            return
        advice = {
            "failed": f"mend the cause (see {self.directory / paths.LOG}) and give the same command again; if the "
            "cause is a parameter, change it and give the run another name (-r run_dir runs/NAME)",
            "interrupted": "give the same command again: it goes on from the last checkpoint, if there is one",
            "running": "wait for it",
            "queued": "start it with launch()",
        }[status.status]
        happened = ": ".join(part for part in (status.cause, status.message) if part) or status.stage
        kind = RunCutOffError if status.status == "interrupted" else RunError
        raise kind(
            f"run {self.name} is not done but {status.status}, at {status.unit} {status.step} of {status.max_steps} "
            f"({happened}); {advice}"
        )

    def load_model(self, build_model: "Callable[..., Model]", *, trust_code: bool = False) -> "Model":
        """The model with the weights of the newest whole checkpoint, in evaluation mode, on the CPU.

        Args:
            build_model: `hydra.model.framework.build_model`; it gets the model spec that the checkpoint carries.
            trust_code: run the code that the run holds in `code/`, with which whoever wrote it can do what you can.
                Only runs with an attention class of their own have any.

        Raises:
            CheckpointError: there is no checkpoint yet that is whole.
            ConfigError: the run holds code and is not trusted, or the code is not what it was started with.
        """
        newest = newest_whole(self.directory)
        if newest is None:
            raise CheckpointError(
                f"run {self.name} must have a whole checkpoint, but has none ({self.status().status}); one is written "
                "every checkpoint_every steps and at the end"
            )
        checkpoint = load_checkpoint(newest, groups=("model",))
        spec = checkpoint.trainer_state["model_spec"]
        assert isinstance(spec, Mapping)
        model = build_model(spec, code_dir=self.directory / paths.CODE) if trust_code else build_model(spec)
        model.load_state_dict(dict(checkpoint.tensors["model"]), strict=True)
        return model.eval()

    def load_tokenizer(self) -> "Tokenizer":
        """The tokenizer the run was trained with.

        Raises:
            RunError: the file is missing or damaged.
        """
        from tokenizers import Tokenizer

        path = self.directory / paths.TOKENIZER
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises nothing more special
            raise paths.damaged(path, str(error)) from error

    def check_files(self) -> None:
        """Return if every file that readers parse can be read, as far as there is one.

        Raises:
            RunError: naming a damaged file, and what to do.
        """
        self.status(), self.metrics(), self.samples(), self.memory_plan(), read_sums(self.directory)
        for name in (paths.CONFIG, paths.ENVIRONMENT, paths.MANIFEST, paths.RESULTS):
            paths.read_json(self.directory / name)
        if (self.directory / paths.TOKENIZER).exists():
            self.load_tokenizer()

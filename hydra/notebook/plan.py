"""What a papermill command asks for, and what was made of it before anything was started or written."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hydra.notebook.parameters import RUN_DIR, default_run_dir
from hydra.runtime import workspace_root
from hydra.runtime.secrets import MASK

TRAINING, COMPARISON = "training", "comparison"


@dataclass(frozen=True, kw_only=True)
class Request:
    """A papermill command, read but not yet checked against a config. `run_dir` is absolute."""

    notebook: str
    notebook_name: str
    parameters: Mapping[str, object]
    run_dir: Path
    secrets: tuple[str, ...] = ()
    """Names of parameters of the notebook's own, not of a config, whose values it marks as secret."""
    job: str = TRAINING
    """What the notebook's metadata say that it does (`hydra.job`): TRAINING or COMPARISON."""
    reads_parameters: bool = True
    """Whether its code asks for its parameters (`read_parameters`): else it may make any config of them."""

    def command(self, engine_name: str, arguments: list[str], run_dir: Path) -> str:
        """What to type in the present folder to run the notebook with these papermill arguments in `run_dir`."""
        output = _relative(run_dir / f"{self.notebook_name}.ipynb", Path.cwd())
        words = ["papermill", self.notebook, output, "--engine", engine_name, *arguments]
        if run_dir != (workspace_root() / default_run_dir(self.notebook_name)).resolve():
            words += ["-r", RUN_DIR, _relative(run_dir, workspace_root())]
        for name in self.secrets:
            words += ["-r", name, MASK]
        return shlex.join(words)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request that has passed every check: what the engine executes and the report tells.

    Attributes:
        run_dir: absolute.
        question: what was asked for, in one or two sentences.
        command: what to type for the same run, and to go on with one that was cut off.
        config: every field, resolved; {} for a notebook without a config.
        differences: fields that differ from the preset, as (the preset's value, own value).
        job: TRAINING or COMPARISON.
    """

    run_dir: Path
    notebook_name: str
    question: str
    command: str
    config: Mapping[str, object]
    differences: Mapping[str, tuple[object, object]]
    job: str = TRAINING


def _relative(path: Path, to: Path) -> str:
    return str(path.relative_to(to) if path.is_relative_to(to) else path)

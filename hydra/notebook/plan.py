"""What a papermill command asks for, and what was made of it before anything was started or written."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Request:
    """A papermill command, read but not yet checked against a config. `run_dir` is absolute."""

    notebook: str
    notebook_name: str
    parameters: Mapping[str, object]
    run_dir: Path

    def command(self, engine_name: str, arguments: list[str], run_dir: Path) -> str:
        """The command that runs the notebook with these papermill arguments in that run directory."""
        shown = _shorten(run_dir)
        words = ["papermill", self.notebook, f"{shown}/{self.notebook_name}.ipynb", "--engine", engine_name, *arguments]
        if shown != f"runs/{self.notebook_name}":
            words += ["-r", "run_dir", shown]
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
    """

    run_dir: Path
    notebook_name: str
    question: str
    command: str
    config: Mapping[str, object]
    differences: Mapping[str, tuple[object, object]]


def next_free(run_dir: Path) -> Path:
    """The first of run_dir-2, run_dir-3, ... that does not exist."""
    number = 2
    while run_dir.with_name(f"{run_dir.name}-{number}").exists():
        number += 1
    return run_dir.with_name(f"{run_dir.name}-{number}")


def _shorten(path: Path) -> str:
    from hydra.runtime import workspace_root

    root = workspace_root()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)

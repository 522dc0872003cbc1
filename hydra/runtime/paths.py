"""Where a run keeps what, and how files come into being whole."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.runtime.secrets import mask_texts

CONFIG = "config.json"
CODE = "code"
STATE = "state.json"
ENVIRONMENT = "environment.json"
MEMORY_PLAN = "memory.json"
MANIFEST = "data.json"
TOKENIZER = "tokenizer.json"
METRICS = "metrics.jsonl"
RESULTS = "results.json"  # of a comparison
SAMPLES = "samples.jsonl"
SKIPPED = "skipped_steps.jsonl"
LOG = "trainer.log"
LOCK = "lock"
EVENTS = "events"
WANDB = "wandb"
TRACKED = "tracked.json"  # in wandb/: the run's id there, and how far it was handed over
CHECKPOINTS = "checkpoints"


def workspace_root() -> Path:
    """The nearest directory at or above the working one with `pyproject.toml` and `notebooks/`, else the working one.

    Relative paths of runs, data and corpora are relative to it, so that a notebook in `notebooks/` and a command
    in the checkout mean the same files.
    """
    here = Path.cwd()
    for directory in (here, *here.parents):
        if (directory / "pyproject.toml").is_file() and (directory / "notebooks").is_dir():
            return directory
    return here


def next_free(run_dir: Path) -> Path:
    """The first of run_dir-2, run_dir-3, ... that does not exist."""
    number = 2
    while run_dir.with_name(f"{run_dir.name}-{number}").exists():
        number += 1
    return run_dir.with_name(f"{run_dir.name}-{number}")


def sync_file(path: Path) -> None:
    """Make the content of `path` durable, if there is such a file."""
    if path.exists():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable: a rename survives power loss only after this."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` beside `path` and rename: a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def remove_abandoned_temporaries(directory: Path) -> None:
    """Remove what `write_atomically` left in `directory` when its process was killed in the middle of a write."""
    for temporary in directory.iterdir():
        written_by = re.fullmatch(r"\..+\.(\d+)\.tmp", temporary.name)
        if written_by and not Path("/proc", written_by[1]).exists():
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write one JSON object atomically, secrets masked; NaN and infinity are refused, which JSON does not have."""
    write_atomically(path, json.dumps(mask_texts(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or {} when there is no such file yet."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    assert isinstance(value, dict), path
    return value

"""Checkpoints that cannot be half: written beside, made durable, renamed. safetensors and JSON only, never pickle."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import CheckpointError
from hydra.runtime import paths

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
# Nothing else in the folder is ours to count, or to remove.
NAME = re.compile(r"step-\d{8,}")
UNFINISHED_NAME = re.compile(r"(\.writing-)?step-\d{8,}")


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds: named groups of tensors (`model`, `optimizer`, `rng`) and the trainer's JSON state."""

    tensors: Mapping[str, Mapping[str, "Tensor"]]
    trainer_state: Mapping[str, Any]


def checkpoint_directory(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` finished optimizer steps lies."""
    return run_dir / paths.CHECKPOINTS / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first. A directory without a manifest was never finished and does not count."""
    found = (run_dir / paths.CHECKPOINTS).glob("step-*")
    complete = [directory for directory in found if NAME.fullmatch(directory.name) and (directory / MANIFEST).is_file()]
    return sorted(complete, key=lambda directory: int(directory.name.removeprefix("step-")))


def save_checkpoint(run_dir: Path, step: int, checkpoint: Checkpoint, keep_last: int) -> Path:
    """Write the checkpoint of `step`, then remove all but the newest `keep_last`.

    Everything is written to a directory beside, file by file with fsync, the manifest with every file's SHA-256 last;
    one rename makes it a checkpoint. A crash at any point leaves the checkpoints that were there.
    """
    final = checkpoint_directory(run_dir, step)
    final.parent.mkdir(exist_ok=True)
    _remove_unfinished(final.parent)
    if final not in list_checkpoints(run_dir):
        _write(final, checkpoint)
    for old in list_checkpoints(run_dir)[:-keep_last]:
        _remove(old)
    return final


def _write(final: Path, checkpoint: Checkpoint) -> None:
    from safetensors.torch import save_file

    temporary = final.parent / f".writing-{final.name}"
    temporary.mkdir()
    for group, tensors in checkpoint.tensors.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / f"{group}.safetensors")
    (temporary / TRAINER_STATE).write_text(json.dumps(checkpoint.trainer_state, indent=2, allow_nan=False) + "\n")
    files = {file.name: _describe(file) for file in sorted(temporary.iterdir())}
    (temporary / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")
    for file in temporary.iterdir():
        file.chmod(0o644)  # safetensors gives its files to their owner alone; a run is there to be shared
        paths.sync_file(file)
    paths.sync_directory(temporary)
    os.rename(temporary, final)
    paths.sync_directory(final.parent)


def load_checkpoint(directory: Path, groups: tuple[str, ...]) -> Checkpoint:
    """Read the named groups of a checkpoint onto the CPU, each file checked against its SHA-256 first.

    Raises:
        CheckpointError: a file is missing, of another size, or of other content than when it was written.
    """
    from safetensors.torch import load

    try:
        files = json.loads((directory / MANIFEST).read_text())["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(_damaged(directory / MANIFEST, f"is no manifest ({error!r})")) from None
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in [*(f"{group}.safetensors" for group in groups), TRAINER_STATE]:
        path = directory / name
        if name not in files or not path.is_file():
            raise CheckpointError(_damaged(path, "is missing"))
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != files[name]["sha256"]:
            raise CheckpointError(_damaged(path, "has changed since it was written (SHA-256 differs)"))
        if name != TRAINER_STATE:  # parsed at once: the bytes of one group are held at a time
            tensors[name.removesuffix(".safetensors")] = load(content)
    return Checkpoint(tensors, json.loads(content))


def _damaged(path: Path, what: str) -> str:
    return (
        f"every file of a checkpoint must be as it was written, but {path} {what}; "
        f"remove {path.parent} to go on from the checkpoint before it"
    )


def _describe(file: Path) -> dict[str, object]:
    with open(file, "rb") as opened:
        return {"n_bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _remove(directory: Path) -> None:
    """Take the manifest first: from then on the rest is no checkpoint, however far the removal comes."""
    (directory / MANIFEST).unlink()
    paths.sync_directory(directory)
    shutil.rmtree(directory)


def _remove_unfinished(parent: Path) -> None:
    for directory in parent.iterdir():
        if not UNFINISHED_NAME.fullmatch(directory.name):
            continue
        if not (directory / MANIFEST).is_file() or directory.name.startswith(".writing-"):
            logger.info("removing %s, which was never finished", directory)
            shutil.rmtree(directory)

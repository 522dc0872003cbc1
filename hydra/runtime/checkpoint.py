"""Checkpoints that cannot be half: written beside, made durable, renamed. safetensors and JSON only, never pickle."""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import CheckpointError
from hydra.runtime import paths
from hydra.runtime.safetensors_format import safetensors_pieces

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
# Nothing else in the folder is ours to count, or to remove.
NAME = re.compile(r"step-\d{8,}")
UNFINISHED_NAME = re.compile(r"\.(writing|removing)-step-\d{8,}")


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds: named groups of tensors (`model`, `optimizer`, `rng`) and the trainer's JSON state."""

    tensors: Mapping[str, Mapping[str, "Tensor"]]
    trainer_state: Mapping[str, Any]


def checkpoint_directory(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` finished optimizer steps lies."""
    return run_dir / paths.CHECKPOINTS / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints by their names, oldest first: each was finished, and may have been damaged since."""
    found = (run_dir / paths.CHECKPOINTS).glob("step-*")
    return sorted((path for path in found if NAME.fullmatch(path.name)), key=step_of)


def has_checkpoint(run_dir: Path, step: int) -> bool:
    """Whether one of `step` finished steps has been written."""
    return checkpoint_directory(run_dir, step).is_dir()


def step_of(directory: Path) -> int:
    """Finished optimizer steps of the checkpoint in `directory`."""
    return int(directory.name.removeprefix("step-"))


def newest_whole(run_dir: Path, *, before: int | None = None, sets_aside: bool = False) -> Path | None:
    """The newest checkpoint whose every file is as it was written; None if there is none. Damaged ones are logged.

    Args:
        before: look at those of fewer finished steps only.
        sets_aside: rename damaged ones to `damaged-step-...`, so that nothing takes them for checkpoints again. For
            the owner of the run only.
    """
    is_damaged = False
    for directory in reversed(list_checkpoints(run_dir)):
        if before is not None and step_of(directory) >= before:
            continue
        try:
            check_checkpoint(directory)
        except CheckpointError as error:
            logger.warning("%s; going on without it", error)
            is_damaged = True
            if sets_aside:
                _set_aside(directory)
        else:
            if is_damaged:
                logger.warning("instead of it %s is used", directory.name)
            return directory
    return None


def check_checkpoint(directory: Path) -> None:
    """Return if every file of the checkpoint is as it was written.

    Raises:
        CheckpointError: naming the first that is missing, of another size or of other content.
    """
    for name, described in _read_manifest(directory).items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(_damaged(path, "is missing"))
        if _describe(path) != described:
            raise CheckpointError(_damaged(path, "has changed since it was written (SHA-256 differs)"))


def save_checkpoint(
    run_dir: Path, step: int, checkpoint: Checkpoint, keep_last: int, keep_steps: Collection[int] = ()
) -> Path:
    """Write the checkpoint of `step`, then remove all but the newest `keep_last` and those of `keep_steps`.

    Everything is written to a directory beside, file by file with fsync, the manifest with every file's SHA-256 last;
    one rename makes it a checkpoint. A crash at any point leaves the checkpoints that were there.
    """
    for _ in save_in_pieces(run_dir, step, checkpoint, keep_last, keep_steps):
        pass
    return checkpoint_directory(run_dir, step)


def save_in_pieces(
    run_dir: Path, step: int, checkpoint: Checkpoint, keep_last: int, keep_steps: Collection[int] = ()
) -> Iterator[bool]:
    """What `save_checkpoint` does, in pieces that any thread may do.

    While it writes they take about a millisecond each; the removal of an old checkpoint is one.

    Yields:
        After each piece whether the rest is mostly a wait for the disk, and takes no more processor to speak of.
    """
    final = checkpoint_directory(run_dir, step)
    final.parent.mkdir(exist_ok=True)
    _remove_unfinished(final.parent)
    if not has_checkpoint(run_dir, step):
        try:
            yield from _write(final, checkpoint)
        except OSError:
            with contextlib.suppress(OSError):
                _remove_unfinished(final.parent)  # on a disk that is full it takes room
            raise
    for old in list_checkpoints(run_dir)[:-keep_last]:
        if step_of(old) not in keep_steps:
            _remove(old)
            yield True


def _write(final: Path, checkpoint: Checkpoint) -> Iterator[bool]:
    temporary = final.parent / f".writing-{final.name}"
    temporary.mkdir()
    files: dict[str, object] = {}
    state = (json.dumps(checkpoint.trainer_state, indent=2, allow_nan=False) + "\n").encode()
    contents = {f"{group}.safetensors": safetensors_pieces(tensors) for group, tensors in checkpoint.tensors.items()}
    for name, pieces in {**contents, TRAINER_STATE: iter([memoryview(state)])}.items():
        sha256, n_bytes = hashlib.sha256(), 0
        with open(temporary / name, "wb") as file:
            for piece in pieces:
                file.write(piece)
                sha256.update(piece)
                n_bytes += len(piece)
                yield False
        files[name] = {"n_bytes": n_bytes, "sha256": sha256.hexdigest()}
    (temporary / MANIFEST).write_text(_manifest_text(dict(sorted(files.items()))))
    for name in (*files, MANIFEST):
        yield True
        paths.sync_file(temporary / name)
    paths.sync_directory(temporary)
    os.rename(temporary, final)
    paths.sync_directory(final.parent)


def load_checkpoint(directory: Path, groups: tuple[str, ...]) -> Checkpoint:
    """Read the named groups of a checkpoint onto the CPU, each file checked against its SHA-256 first.

    Raises:
        CheckpointError: a file is missing, of another size, or of other content than when it was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    files = _read_manifest(directory)
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in [*(f"{group}.safetensors" for group in groups), TRAINER_STATE]:
        path = directory / name
        if name not in files or not path.is_file():
            raise CheckpointError(_damaged(path, "is missing"))
        content = path.read_bytes()
        if files[name] != {"n_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}:
            raise CheckpointError(_damaged(path, "has changed since it was written (SHA-256 differs)"))
        try:
            if name == TRAINER_STATE:
                trainer_state = dict(json.loads(content))
            else:  # parsed at once: the bytes of one group are held at a time
                tensors[name.removesuffix(".safetensors")] = load(content)
        except (SafetensorError, ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(_damaged(path, f"is not of its kind ({error})")) from None
    return Checkpoint(tensors, trainer_state)


def _read_manifest(directory: Path) -> dict[str, dict[str, object]]:
    """What is known of every file of a checkpoint: `n_bytes` and `sha256`, by name."""
    path = directory / MANIFEST
    try:
        text = path.read_text()
        files = json.loads(text)["files"]
        described = {name: {key: files[name][key] for key in ("n_bytes", "sha256")} for name in files}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(_damaged(path, f"is no manifest ({error!r})")) from None
    if text != _manifest_text(described):
        raise CheckpointError(_damaged(path, "has changed since it was written"))
    return described


def _manifest_text(files: Mapping[str, object]) -> str:
    return json.dumps({"files": files}, indent=2) + "\n"


def _damaged(path: Path, what: str) -> str:
    return f"every file of a checkpoint must be as it was written, but {path} {what}"


def _set_aside(directory: Path) -> None:
    name, number = f"damaged-{directory.name}", 1
    while (directory.parent / name).exists():
        number += 1
        name = f"damaged-{directory.name}-{number}"
    os.rename(directory, directory.parent / name)
    paths.sync_directory(directory.parent)
    logger.warning("%s is kept as %s", directory.name, name)


def _describe(file: Path) -> dict[str, object]:
    with open(file, "rb") as opened:
        return {"n_bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _remove(directory: Path) -> None:
    """Take its name first: from then on the rest is no checkpoint, however far the removal comes."""
    unnamed = directory.with_name(f".removing-{directory.name}")
    os.rename(directory, unnamed)
    paths.sync_directory(directory.parent)
    shutil.rmtree(unnamed)


def _remove_unfinished(parent: Path) -> None:
    for directory in parent.iterdir():
        if UNFINISHED_NAME.fullmatch(directory.name):
            logger.info("removing %s, which was never finished", directory)
            shutil.rmtree(directory)

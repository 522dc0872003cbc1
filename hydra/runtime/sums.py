"""What a finished run consists of: SHA256SUMS, which `sha256sum -c` reads too, names every file and its content."""

import hashlib
import os
from pathlib import Path

from hydra.errors import DamagedFileError
from hydra.runtime import paths

NOT_OF_THE_RUN = {paths.SUMS, paths.LOCK}


def has_sums(run_dir: Path) -> bool:
    """Whether the run has been taken down."""
    return (run_dir / paths.SUMS).is_file()


def remove_sums(run_dir: Path) -> None:
    """Forget what was taken down, since the run is about to change."""
    (run_dir / paths.SUMS).unlink(missing_ok=True)


def write_sums(run_dir: Path) -> None:
    """Take down every file of the run as it is now."""
    _write(run_dir, {name: _hash(run_dir / name) for name in _files(run_dir)})


def update_sums(file: Path) -> None:
    """Take down `file` anew, if it lies in a run that has been taken down: a notebook or report of it that was made
    after its end, or made again.

    Raises:
        DamagedFileError: SHA256SUMS is damaged.
    """
    run_dir = file.parent
    if has_sums(run_dir):
        _write(run_dir, {**read_sums(run_dir), file.name: _hash(file)})


def find_altered_files(run_dir: Path) -> list[str]:
    """One line for each file that is not as it was taken down, is missing, or has come since; [] if all is well.

    A run that has not been taken down, since it is not done, gives one line that says so.
    """
    if not has_sums(run_dir):
        return [f"{paths.SUMS}: there is none; it is written when a run is done"]
    try:
        known = read_sums(run_dir)
    except DamagedFileError as error:
        return [str(error)]
    there = set(_files(run_dir))
    problems = [f"{name}: is missing" for name in sorted(known.keys() - there)]
    problems += [f"{name}: has come since the run was done" for name in sorted(there - known.keys())]
    problems += [
        f"{name}: has changed since it was written (SHA-256 differs)"
        for name in sorted(known.keys() & there)
        if _hash(run_dir / name) != known[name]
    ]
    return problems


def _files(run_dir: Path) -> list[str]:
    """But for what W&B keeps there, which it goes on to change when it is sent."""
    found = (str(Path(folder, name).relative_to(run_dir)) for folder, _, names in os.walk(run_dir) for name in names)
    return sorted(
        name
        for name in found
        if name not in NOT_OF_THE_RUN and not Path(name).name.startswith(".") and Path(name).parts[0] != paths.WANDB
    )


def _hash(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_sums(run_dir: Path) -> dict[str, str]:
    """Hashes by name; {} of a run that has not been taken down.

    Raises:
        DamagedFileError: it cannot be read, or a line is not one that `_write` writes.
    """
    path = run_dir / paths.SUMS
    known: dict[str, str] = {}
    try:
        lines = path.read_text(errors="strict").splitlines()
    except FileNotFoundError:
        return known
    except (OSError, ValueError) as error:
        raise paths.damaged(path, str(error)) from None
    for line in lines:
        digest, separator, name = line.partition("  ")
        if len(digest) != 64 or not separator or not name or name in known:
            raise paths.damaged(path, f"line {line!r}")
        known[name] = digest
    return known


def _write(run_dir: Path, known: dict[str, str]) -> None:
    lines = (f"{digest}  {name}\n" for name, digest in sorted(known.items()))
    paths.write_atomically(run_dir / paths.SUMS, "".join(lines))

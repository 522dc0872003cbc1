"""Where a run keeps what, and how files come into being whole."""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.errors import ConfigError, DamagedFileError, RunError
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
RUNS = "runs"
SUMS = "SHA256SUMS"
MAX_NAME_BYTES = 255  # of a file or folder, on Linux

REMEDIES = {
    CONFIG: "put back a copy of it, or give another run_dir",
    STATE: "remove it and give the same command again: what is done stays done",
    ENVIRONMENT: "put back a copy of it, or remove it: device, dtype and kernels are then chosen anew",
    MEMORY_PLAN: "put back a copy of it, or remove it: memory is then planned anew",
    MANIFEST: "put back a copy of it, or manifest.json of the folder in data_dir that a checkpoint's "
    "trainer_state.json names as data_fingerprint; where there is no checkpoint remove it",
    TOKENIZER: "copy it from the folder in data_dir that data.json names by its fingerprint",
    SUMS: "put back a copy of it, or remove it: python -m scripts.trainer RUN_DIR takes the files down as they are",
    RESULTS: "remove it and give the same command again: it is written anew from the runs that are done",
}
"""What to do when a file of a run is damaged. Any other is kept only so that it need not be made again."""


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


def check_path(given: str, what: str) -> None:
    """Return if the text is a path on this machine that means what it seems to mean.

    Raises:
        ConfigError: it holds braces or what cannot be seen, a name that is too long, an address, or .. behind a /.
    """
    if not given.isprintable() or {"{", "}"} & set(given):
        raise ConfigError(f"{what} must be a path of printable characters without braces, but got {given!r}")
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in Path(given).parts):
        raise ConfigError(
            f"{what} must be a path of names of at most {MAX_NAME_BYTES} bytes, but got {given[:80]!r}..."
        )
    if "://" in given:
        raise ConfigError(f"{what} must be a path on this machine, but got {given!r}; fetch the file first")
    if Path(given).is_absolute() and ".." in Path(given).parts:
        raise ConfigError(f"{what} must be written without .. when it is absolute, but got {given!r}")


def resolve_inside(given: str, start: Path, what: str) -> Path:
    """The absolute path: an absolute one as it is; one relative to `start` must stay in it, or in the workspace.

    `runs` itself may be a link to another disk. What lies in it, or elsewhere in the workspace, may not lead out.

    Raises:
        ConfigError: `check_path` refuses it, or .. or a link leads out.
    """
    check_path(given, what)
    root = workspace_root()
    try:
        resolved = (start / given).resolve()
        allowed = (start.resolve(), root.resolve(), (root / RUNS).resolve())
    except (OSError, RuntimeError) as error:  # links that lead in a circle
        raise ConfigError(f"{what} must be the path of a file or folder, but {given} is none: {error}") from None
    if not Path(given).is_absolute() and not any(resolved.is_relative_to(folder) for folder in allowed):
        raise ConfigError(
            f"{what} must stay in the workspace {root}, but {given} leads to {resolved}; name a place elsewhere by its "
            "absolute path"
        )
    return resolved


def resolve_run_dir(given: str | Path, what: str = "run_dir") -> Path:
    """The absolute path of a run directory; relative ones start at the workspace root.

    Raises:
        ConfigError: it is no path, or as `resolve_inside` does.
    """
    if not isinstance(given, str | Path) or not str(given).strip():
        raise ConfigError(f"{what} must be a path, such as 'runs/first', but got {given!r}")
    root = workspace_root()
    run_dir = resolve_inside(str(given), root, what)
    if run_dir == root and (root / "pyproject.toml").is_file():
        raise ConfigError(f"{what} must be a folder of its own, but {str(given)!r} is the workspace; give runs/NAME")
    return run_dir


def refuse_links_out(run_dir: Path) -> None:
    """Return if no link in a run directory leads out of it: who reads or writes the run would read or write elsewhere.

    What lies in `wandb/` is W&B's, which links to logs of its own there, and is read by nobody else.

    Raises:
        RunError: naming the link.
    """
    inside = run_dir.resolve()
    for folder, directories, files in os.walk(run_dir):
        if Path(folder) == run_dir / WANDB:
            directories.clear()
            continue
        for path in (Path(folder, name) for name in (*directories, *files)):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                raise RunError(
                    f"a run directory must hold what belongs to it, but {path} is a link to {path.readlink()}; remove "
                    "the link. (To keep runs on another disk make `runs` itself a link, or give an absolute run_dir)"
                )


def next_free(run_dir: Path) -> Path:
    """The first of run_dir-2, run_dir-3, ... that does not exist."""
    number = 2
    while run_dir.with_name(f"{run_dir.name}-{number}").exists():
        number += 1
    return run_dir.with_name(f"{run_dir.name}-{number}")


def shown(path: Path) -> str:
    """The path as one would write it: relative to the workspace root where it lies inside."""
    root = workspace_root()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def check_folder(name: str, folder: Path) -> None:
    """Return if the parameter `name` may name `folder`: it is a folder, or can be made, and one may write there.

    Raises:
        ConfigError: naming the parameter.
    """
    existing = folder
    try:
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise ConfigError(f"{name} must be the path of a folder, but {existing} is a file; give another name")
        # Permissions do not tell all: in a folder such as /proc nobody can make a file.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(
            f"{name} must lie where one may write, but got {folder} (in {existing}: {error.strerror}); "
            "give another place"
        ) from None


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


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it the system's errors name `path`; by themselves those of writing name no file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` beside `path` and rename: a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
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
    """The JSON object in `path`, a file of a run, or {} when there is no such file yet.

    Raises:
        RunError: it cannot be read, or is not what was written; the message names the file and what to do.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from None
    if not isinstance(value, dict):
        raise damaged(path, f"it must hold a JSON object, but holds {json.dumps(value)[:40]}")
    return value


def damaged(path: Path, why: str) -> DamagedFileError:
    """The error for a file of a run that is not as it was written, with what to do."""
    remedy = REMEDIES.get(path.name, "remove it")
    return DamagedFileError(f"{path} must be as it was written, but is damaged ({why}); {remedy}")

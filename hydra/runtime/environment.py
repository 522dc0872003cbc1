"""What a run ran on: versions, source, machine; and the choices that were made once for it."""

import importlib.metadata
import logging
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.runtime import paths
from hydra.runtime.source import source_sha256

logger = logging.getLogger(__name__)
# What may change the last bits of a result, beside torch.
DECIDE_BITS = ("cpu", "cpu_capability", "gpu", "source_sha256")
PACKAGES = ("torch", "torchao", "numpy", "tokenizers", "safetensors", "pydantic", "papermill", "nbconvert")


def describe_session() -> dict[str, object]:
    """Versions, source revision and machine of this process, at this time (Unix seconds)."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "started_at": time.time(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "n_cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "packages": {name: _version(name) for name in PACKAGES},
        "source_sha256": source_sha256(),
        **describe_source(),
    }


def describe_source() -> dict[str, object]:
    """Commit of the HYDRA checkout that this process imports, and whether files differ from it; None outside of git."""
    checkout = Path(__file__).parents[2]
    commit = _git(checkout, "rev-parse", "HEAD")
    changes = _git(checkout, "status", "--porcelain")
    return {"git_commit": commit, "git_dirty": None if changes is None else bool(changes)}


def record_session(run_dir: Path, session: Mapping[str, object], choices: Mapping[str, object]) -> dict[str, Any]:
    """Append `session` to environment.json and return the choices that hold: those of the first session, for good."""
    path = run_dir / paths.ENVIRONMENT
    environment = paths.read_json(path)
    for before in environment.get("sessions", [])[-1:]:
        changed = [name for name in DECIDE_BITS if before.get(name) != session.get(name)]
        if before["packages"]["torch"] != session["packages"]["torch"]:  # type: ignore[index]
            changed.append("torch")
        if changed:
            logger.warning("bit for bit is promised for the same machine and source, but these differ: %s", changed)
    resolved: dict[str, Any] = environment.get("resolved", dict(choices))
    sessions = [*environment.get("sessions", []), dict(session)]
    paths.write_json(path, {**environment, "resolved": resolved, "sessions": sessions})
    return resolved


def record_changes(run_dir: Path, step: int, changes: Mapping[str, tuple[object, object]]) -> None:
    """Note in environment.json in what the run's config differs from `step` on, as name -> (before, after), if at all.

    What it says of later steps is of steps that are taken again now, and goes.
    """
    path = run_dir / paths.ENVIRONMENT
    environment = paths.read_json(path)
    before = environment.get("changes", [])
    noted = [change for change in before if change["step"] < step]
    if changes:
        listed = {name: list(both) for name, both in changes.items()}
        logger.info("from step %d on the config differs: %s", step, listed)
        noted.append({"step": step, "fields": listed})
    if noted != before:
        paths.write_json(path, {**environment, "changes": noted})


def record_choices(run_dir: Path, choices: Mapping[str, object]) -> None:
    """Put the run's choices into its environment.json once more, with what could only be chosen later."""
    path = run_dir / paths.ENVIRONMENT
    paths.write_json(path, {**paths.read_json(path), "resolved": dict(choices)})


def is_code_checked(run_dir: Path, hashes: Mapping[str, str]) -> bool:
    """Whether a session of the run has checked attention classes of these files: SHA-256 by path."""
    return dict(hashes) == paths.read_json(run_dir / paths.ENVIRONMENT).get("checked_code", {})


def record_checked_code(run_dir: Path, hashes: Mapping[str, str]) -> None:
    """Note in environment.json that they were checked, so that a resumed run need not do it again."""
    path = run_dir / paths.ENVIRONMENT
    paths.write_json(path, {**paths.read_json(path), "checked_code": dict(hashes)})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        logger.info("git could not be asked for the source revision: %s", error)
        return None
    return done.stdout.strip() if done.returncode == 0 else None

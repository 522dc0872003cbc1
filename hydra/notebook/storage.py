"""Notebooks that are saved whole or not at all. papermill truncates the only copy first and then writes it."""

import os
from pathlib import Path

import nbformat
from papermill.iorw import LocalHandler, papermill_io

from hydra.runtime.paths import write_atomically
from hydra.runtime.sums import update_sums


class AtomicLocalHandler(LocalHandler):
    """papermill's handler of local files, with a save that makes the folder, writes beside, syncs and renames."""

    def write(self, buf: str, path: str) -> None:
        """Save the text `buf` as `path`, which is relative to the folder that papermill was called in."""
        target = (Path(self._cwd or "") / path).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, buf)
        update_sums(target)  # papermill saves once more after the run is done


def make_local_saves_atomic() -> None:
    """Let papermill save local files atomically, from now on in this process.

    It stays so when the engine is done, since papermill saves once more after that. The handler's class is changed
    and not the handler: papermill holds on to the object for its working directory, and when two are registered as
    "local" the oldest wins.
    """
    for scheme, handler in papermill_io._handlers:
        if scheme == "local" and type(handler) is LocalHandler:
            handler.__class__ = AtomicLocalHandler


def save_copy(nb: nbformat.NotebookNode, path: Path, original: str | None) -> None:
    """Save the notebook as `path` too, unless `original`, where papermill saves it, is that file."""
    if original is not None and os.path.realpath(original) == os.path.realpath(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, nbformat.writes(nb))
    update_sums(path)

"""Notebooks that are saved whole or not at all, with secrets masked. papermill truncates the only copy first."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import nbformat
from papermill.iorw import LocalHandler, StreamHandler, papermill_io

from hydra.errors import RunError
from hydra.notebook.endings import raising_not_saved
from hydra.runtime.paths import shown, write_atomically
from hydra.runtime.secrets import mask_texts
from hydra.runtime.sums import update_sums


class AtomicLocalHandler(LocalHandler):
    """papermill's handler of local files, with a save that makes the folder, writes beside, syncs and renames."""

    def write(self, buf: str, path: str) -> None:
        """Save the text `buf` as `path`, which is relative to the folder that papermill was called in.

        Raises:
            NotSavedError: it cannot be written.
        """
        _save(_mask_notebook(buf), (Path(self._cwd or "") / path).resolve())


class MaskedStreamHandler(StreamHandler):
    """papermill's handler of standard output, as which a notebook may be saved too."""

    def write(self, buf: str, path: str) -> None:
        """Print the text `buf`."""
        super().write(_mask_notebook(buf), path)


class NotebookInUseError(RunError):
    """A notebook that another process executes on the same run."""


@contextlib.contextmanager
def own_notebook(run_dir: Path, name: str) -> Iterator[None]:
    """While entered, no other process executes the notebook of that name on the run: each would save over the other.

    The lock is flock(2), which the kernel frees however the process ends, so that it is never stale.

    Raises:
        NotebookInUseError: another process does so.
        NotSavedError: nothing can be written in the run directory.
    """
    path = run_dir / f".{name}.lock"
    with contextlib.ExitStack() as held:
        with raising_not_saved(path):
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(path.open("a+b", buffering=0))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                owner = f"process {pid}" if (pid := lock.read().decode()) else "another"  # that has only just begun
                raise NotebookInUseError(
                    f"a notebook must be executed by one process at a time, but {owner} executes {name} on "
                    f"{shown(run_dir)}, which is left alone; when that has ended, the same command goes on"
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()).encode())
        yield


OWN_HANDLERS = {LocalHandler: AtomicLocalHandler, StreamHandler: MaskedStreamHandler}


def make_saves_safe() -> None:
    """Let papermill save local files atomically, and no secret in them, from now on in this process.

    It stays so when the engine is done, since papermill saves once more after that. The handler's class is changed
    and not the handler: papermill holds on to the object for its working directory, and when two are registered as
    "local" the oldest wins.
    """
    for _, handler in papermill_io._handlers:
        if type(handler) in OWN_HANDLERS:
            handler.__class__ = OWN_HANDLERS[type(handler)]


def mask_notebook(nb: nbformat.NotebookNode) -> None:
    """Mask the secrets in a notebook that has been executed, in place: papermill goes on with this very object."""
    masked = nbformat.from_dict(mask_texts(nb))
    nb.clear()
    nb.update(masked)


def save_copy(nb: nbformat.NotebookNode, path: Path, original: str | None) -> None:
    """Save the notebook as `path` too, unless `original`, where papermill saves it, is that file.

    Raises:
        NotSavedError: it cannot be written.
    """
    if original is not None and os.path.realpath(original) == os.path.realpath(path):
        return
    _save(_mask_notebook(nbformat.writes(nb)), path)


def _save(text: str, path: Path) -> None:
    with raising_not_saved(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
        update_sums(path)  # papermill saves once more after the run is done


def _mask_notebook(text: str) -> str:
    written: str = nbformat.v4.writes(nbformat.from_dict(mask_texts(nbformat.v4.reads(text))))
    return written

"""Copies of a run in which its steps can be taken without touching it."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hydra.runtime import paths
from hydra.runtime.checkpoint import newest_whole
from hydra.runtime.run import Run

# What a run goes on by, beside its checkpoints and its code.
CARRIED = (paths.CONFIG, paths.ENVIRONMENT, paths.MEMORY_PLAN, paths.MANIFEST, paths.TOKENIZER)


@contextlib.contextmanager
def copied(run: Run, before: int | None = None) -> Iterator[Path]:
    """A copy of the run with its newest whole checkpoint, while it is needed; its records are not copied.

    Args:
        before: take the newest of fewer finished steps than these.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / run.name
        copy.mkdir()
        for name in CARRIED:
            if (run.directory / name).is_file():
                shutil.copy2(run.directory / name, copy / name)
        if (run.directory / paths.CODE).is_dir():
            shutil.copytree(run.directory / paths.CODE, copy / paths.CODE)
        newest = newest_whole(run.directory, before=before)
        if newest is not None:
            shutil.copytree(newest, copy / paths.CHECKPOINTS / newest.name, copy_function=_link)
        yield copy


def _link(source: str, target: str) -> None:
    """A checkpoint is never written to, so that on one file system another name for it is enough."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)

"""Room on the disk: before a run begins, and when there is none left."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from hydra.errors import DiskFullError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""No space, none of one's quota, or a larger file than this process may write."""
CHECKPOINTS_NEEDED = 2
"""A new checkpoint is complete before an old one goes."""


def is_disk_full(error: OSError) -> bool:
    """Whether the error says that no more can be written."""
    return error.errno in FULL


@contextlib.contextmanager
def raising_disk_full() -> Iterator[None]:
    """Within it, or in a function that it decorates, a disk that is full is an error that says what to do.

    Raises:
        DiskFullError: in place of the system's error.
    """
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        file = error.filename or "its files in run_dir and data_dir"
        raise DiskFullError(
            f"a run must be able to write {file}, but the disk is full ({error.strerror}); make room and give the same "
            "command again"
        ) from None


def require_room(directory: Path, checkpoint_bytes: int) -> None:
    """Return if the disk of `directory` has room for two checkpoints.

    Raises:
        DiskFullError: saying how much is missing.
    """
    free, needed = shutil.disk_usage(directory).free, CHECKPOINTS_NEEDED * checkpoint_bytes
    if free < needed:
        raise DiskFullError(
            f"a run must have room for {CHECKPOINTS_NEEDED} checkpoints, {needed / 1e6:,.1f} MB, but the disk of "
            f"{directory} has {free / 1e6:,.1f} MB: {(needed - free) / 1e6:,.1f} MB are missing; make room, or give "
            "another run_dir"
        )

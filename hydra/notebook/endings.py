"""How a batch run ends when not well, and what papermill's command then exits with."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import click

from hydra.errors import DamagedFileError, HydraError
from hydra.runtime.disk import is_disk_full
from hydra.runtime.secrets import mask

FAILED, REJECTED, RESUMABLE = 1, 2, 75


class BatchError(HydraError, click.ClickException):
    """How a batch run ended when not well; papermill's command prints the message and exits with `exit_code`."""

    def __init__(self, message: str, exit_code: int) -> None:
        """`exit_code` is what the command exits with."""
        super().__init__(mask(message))
        self.exit_code = exit_code  # type: ignore[misc]


class NotSavedError(BatchError):
    """A notebook or report that could not be written; what was there before still is."""

    def __init__(self, path: Path, error: OSError | DamagedFileError) -> None:
        """`error` is why not."""
        if isinstance(error, DamagedFileError):  # names another file, which must be mended first
            super().__init__(str(error), FAILED)
            return
        why, remedy = f"the disk is full ({error.strerror})", "make room"
        if not is_disk_full(error):
            why, remedy = str(error.strerror or error), "mend that"
        super().__init__(
            f"{path} must be written, but {why}; what was there is kept; {remedy} and give the same command again",
            FAILED,
        )


@contextlib.contextmanager
def raising_not_saved(path: Path) -> Iterator[None]:
    """Around the writing of a file that a batch run leaves.

    Raises:
        NotSavedError: the operating system refuses it, or a file of the run that must be written too is damaged.
    """
    try:
        yield
    except (OSError, DamagedFileError) as error:
        raise NotSavedError(path, error) from error

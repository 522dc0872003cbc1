"""A run's log, on standard error and in its file, with secrets masked."""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.runtime.disk import is_disk_full
from hydra.runtime.secrets import MaskedStream, mask

logger = logging.getLogger(__name__)
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class MaskedFormatter(logging.Formatter):
    """Formats a record, its traceback included, and masks the secrets in it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, or lines, of the record."""
        return mask(super().format(record))


class LogFile(logging.FileHandler):
    """Appends records to a file. That a full disk has refused some is told once, and is no reason to end a run."""

    _is_full = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Called where the record cannot be written."""
        error = sys.exception()
        if not _is_disk_full(error):
            super().handleError(record)
        elif not self._is_full:
            self._is_full = True  # before the warning, which comes here as well
            logger.warning("%s may miss lines from here on, since it cannot be written: %s", self.baseFilename, error)

    def close(self) -> None:
        """Close it, even where the last lines cannot be written."""
        try:
            super().close()
        except OSError as error:
            if not is_disk_full(error):
                raise


def _is_disk_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and is_disk_full(error)


def log_to_standard_error() -> None:
    """In a process of our own: log to standard error, and mask all that is printed, which may go into a run's log."""
    sys.stdout, sys.stderr = MaskedStream(sys.stdout), MaskedStream(sys.stderr)
    logging.basicConfig(level=logging.INFO, format=FORMAT)
    threading.excepthook = _log_end_of_thread


def _log_end_of_thread(ended: threading.ExceptHookArgs) -> None:
    name, error = ended.thread.name if ended.thread else "a thread", ended.exc_value
    if _is_disk_full(error):
        logger.warning("%s has ended, since the disk is full (%s)", name, error)
    elif error is not None and not isinstance(error, SystemExit):
        logger.error("%s has ended", name, exc_info=error)


@contextmanager
def logging_to(log: Path) -> Iterator[None]:
    """While entered, log records also go to the end of `log`, unless standard error already is that file."""
    handler = LogFile(log)
    if os.path.samestat(os.fstat(sys.__stderr__.fileno()), log.stat()):  # type: ignore[union-attr]
        handler.close()
        yield
        return
    handler.setFormatter(MaskedFormatter(FORMAT))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()

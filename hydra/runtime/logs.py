"""A run's log, on standard error and in its file, with secrets masked."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.runtime.secrets import MaskedStream, mask

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class MaskedFormatter(logging.Formatter):
    """Formats a record, its traceback included, and masks the secrets in it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, or lines, of the record."""
        return mask(super().format(record))


def log_to_standard_error() -> None:
    """In a process of our own: log to standard error, and mask all that is printed, which may go into a run's log."""
    sys.stdout, sys.stderr = MaskedStream(sys.stdout), MaskedStream(sys.stderr)
    logging.basicConfig(level=logging.INFO, format=FORMAT)


@contextmanager
def logging_to(log: Path) -> Iterator[None]:
    """While entered, log records also go to the end of `log`, unless standard error already is that file."""
    handler = logging.FileHandler(log)
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

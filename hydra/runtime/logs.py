"""A run's log file."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextmanager
def logging_to(log: Path) -> Iterator[None]:
    """While entered, log records also go to the end of `log`, unless standard error already is that file."""
    handler = logging.FileHandler(log)
    if os.path.samestat(os.fstat(sys.__stderr__.fileno()), log.stat()):  # type: ignore[union-attr]
        handler.close()
        yield
        return
    handler.setFormatter(logging.Formatter(FORMAT))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()

"""Logs on a full disk: what does not fit is late or lost, and no traceback stands in its place."""

import subprocess
import sys
from pathlib import Path

from hydra.testing import storm

LOG_WITHOUT_ROOM = """
import logging, resource, sys
from pathlib import Path
from hydra.runtime.logs import log_to_standard_error, logging_to
from hydra.testing.faults import file_size_limit
log_to_standard_error()
with logging_to(Path(sys.argv[1])):
    logging.info("before")
    file_size_limit(100)
    for number in range(3):
        logging.info("while it is full %d", number)
    file_size_limit(resource.RLIM_INFINITY)
    logging.info("after")
"""


def errors_of(program: str, log: Path) -> str:
    """What the program, which gets the path of its log, writes to standard error."""
    return subprocess.run(
        [sys.executable, "-c", program, str(log)],
        cwd=storm.ROOT,
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
    ).stderr


def test_a_log_without_room_is_told_of_once_and_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "trainer.log"
    errors = errors_of(LOG_WITHOUT_ROOM, log)
    assert "Traceback" not in errors
    assert errors.count("may miss lines from here on, since it cannot be written") == 1
    assert "before" in log.read_text()
    assert log.read_text().endswith("after\n")


def test_a_log_that_stays_without_room_ends_as_quietly(tmp_path: Path) -> None:
    errors = errors_of(LOG_WITHOUT_ROOM.split("    file_size_limit(resource")[0], tmp_path / "trainer.log")
    assert "Traceback" not in errors

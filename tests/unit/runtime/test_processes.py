"""A process that was started to die with its caller does, and one that was not does not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hydra.runtime.processes import ProcessIdentity

START = """
import os, sys, time
from pathlib import Path
from hydra.runtime.processes import start_process
child = start_process(
    [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"],
    working_dir=Path("/"), log=Path(sys.argv[1]), dies_with_caller=sys.argv[2] == "True",
)
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("dies_with_caller", [True, False])
def test_fate_of_the_child_when_its_parent_is_killed(tmp_path: Path, dies_with_caller: bool) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", START, str(log), str(dies_with_caller)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    deadline = time.monotonic() + 20
    while not log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child = ProcessIdentity.of(pid)
    assert child is not None
    assert child.is_alive()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + (10 if dies_with_caller else 1)
    while child.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert child.is_alive() is not dies_with_caller
    if not dies_with_caller:
        os.kill(pid, signal.SIGKILL)


def test_a_parent_that_is_gone_already_starts_nothing() -> None:
    command = [sys.executable, "-m", "hydra.runtime.die_with_parent", "SIGTERM", "1", "echo", "ran"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ran" not in done.stdout

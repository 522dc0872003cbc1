"""Who is alive: a process is its pid, its start time and the machine's boot, so that a reused pid is nobody's."""

import os
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

# Set by the papermill engine for its kernel: the run directory that it has decided on, and its own process id.
ENGINE_RUN_DIR = "HYDRA_ENGINE_RUN_DIR"
ENGINE_PID = "HYDRA_ENGINE_PID"


@dataclass(frozen=True, kw_only=True)
class ProcessIdentity:
    """One process as long as it lives. `start_ticks` is in clock ticks since boot (`/proc/<pid>/stat`, field 22)."""

    pid: int
    start_ticks: int
    boot_id: str
    pid_namespace: str
    host: str

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity | None":
        """Who has `pid` now on this machine; None when nobody does, or only a zombie."""
        start_ticks = _start_ticks(pid)
        if start_ticks is None:
            return None
        return cls(
            pid=pid,
            start_ticks=start_ticks,
            boot_id=boot_id(),
            pid_namespace=pid_namespace(),
            host=socket.gethostname(),
        )

    def is_here(self) -> bool:
        """Whether it belongs to this boot of this machine and shares our pids, so that `is_alive` can tell."""
        return self.boot_id == boot_id() and self.pid_namespace == pid_namespace()

    def is_before_a_reboot(self) -> bool:
        """Whether this machine has been started anew since, so that it cannot live."""
        return self.host == socket.gethostname() and self.boot_id != boot_id()

    def is_alive(self) -> bool:
        """Whether this very process still runs (on this machine)."""
        return self.is_here() and _start_ticks(self.pid) == self.start_ticks


def boot_id() -> str:
    """Identifies this boot of this machine (Linux)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def pid_namespace() -> str:
    """Identifies who shares our pids: containers on one machine do not."""
    return str(Path("/proc/self/ns/pid").readlink())


def is_batch() -> bool:
    """Whether this process is a kernel that the papermill engine started, with nobody looking on."""
    return ENGINE_RUN_DIR in os.environ


def current_process() -> ProcessIdentity:
    """The calling process."""
    identity = ProcessIdentity.of(os.getpid())
    assert identity is not None
    return identity


def _start_ticks(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name stands in parentheses and may hold spaces: count fields from behind it.
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def _openmp_policy() -> dict[str, str]:
    """How threads that wait in OpenMP do so, unless the user has said it.

    By default they spin for milliseconds, which makes a step on a busy machine half as slow again; with
    OMP_WAIT_POLICY=PASSIVE they sleep at once, and waking them for each small operation takes a seventh of a step
    (measured on two cores, `debug` preset). A short spin costs neither; one of a tenth of this costs small uncompiled
    models two thirds of a step (104 ms became 173, `small` preset).
    """
    return {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": "10000"}


def start_process(
    command: list[str], *, working_dir: Path, log: Path, dies_with_caller: bool
) -> "subprocess.Popen[bytes]":
    """Start `command` in a session of its own, its output appended to `log`.

    Args:
        dies_with_caller: it gets SIGTERM when the calling process ends, however that ends; else it stays.
    """
    if dies_with_caller:
        # The kernel ties the signal to the thread that starts the process, so that thread has to last.
        assert threading.current_thread() is threading.main_thread()
        command = [sys.executable, "-m", "hydra.runtime.die_with_parent", "SIGTERM", str(os.getpid()), *command]
    with open(log, "ab") as output:
        return subprocess.Popen(
            command,
            cwd=working_dir,
            env={**_openmp_policy(), **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

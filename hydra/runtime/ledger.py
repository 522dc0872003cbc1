"""The ledger of a run: who owns it, what it is doing, and how it ended. Written by its one owner, read by anyone."""

import errno
import fcntl
import functools
import logging
import os
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from hydra.errors import RunError
from hydra.runtime import paths
from hydra.runtime.disk import is_disk_full
from hydra.runtime.processes import ProcessIdentity, current_process

if TYPE_CHECKING:
    from pydantic import ConfigDict, TypeAdapter

logger = logging.getLogger(__name__)
Status = Literal["queued", "running", "done", "failed", "interrupted"]
HEARTBEAT_EVERY_S = 1.0
# An owner on another machine, or in another container, cannot be asked whether it lives: it is believed while its
# heartbeat is this fresh. A thread keeps it fresh, so that a long evaluation is no reason to be taken for dead.
FOREIGN_HEARTBEAT_S = 120.0
IDLE_HEARTBEAT_EVERY_S = 20.0
RESERVED_BYTES = 1 << 14
READ_ONLY = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What `state.json` holds. Times are Unix seconds, durations seconds, `val_*` those of the last evaluation.

    `status` as stored is what the owner last knew; `reconciled` compares it with what is alive.
    """

    __pydantic_config__: ClassVar["ConfigDict"] = {"extra": "forbid"}

    status: Status = "queued"
    stage: str = "not started"
    unit: str = "step"
    """What is counted: optimizer steps of a training run, runs of a comparison."""
    step: int = 0
    max_steps: int = 0
    tokens: int = 0
    restarts: int = 0
    skipped_steps: int = 0
    cause: str | None = None
    message: str | None = None
    owner: ProcessIdentity | None = None
    started_at: float | None = None
    ended_at: float | None = None
    heartbeat_at: float | None = None
    train_s: float = 0.0
    train_flops: float = 0.0
    n_parameters: int = 0
    val_loss_nats: float | None = None
    val_bits_per_byte: float | None = None

    @property
    def is_alive(self) -> bool:
        """Whether a trainer is at work on it (true of a reconciled status only)."""
        return self.status == "running"

    @property
    def pid(self) -> int | None:
        """The owner's process id, on the owner's machine."""
        return self.owner.pid if self.owner else None

    def reconciled(self) -> "RunStatus":
        """The same, but a run whose owner is gone is `interrupted`, whatever its last owner managed to write."""
        if self.status != "running":
            return self
        assert self.owner is not None and self.heartbeat_at is not None
        if self.owner.is_here() or self.owner.is_before_a_reboot():
            is_believed = self.owner.is_alive()
        else:
            is_believed = time.time() - self.heartbeat_at < FOREIGN_HEARTBEAT_S
        if is_believed:
            return self
        message = f"its trainer (process {self.owner.pid} on {self.owner.host}) ended without a word"
        return replace(self, status="interrupted", cause="killed", message=message, ended_at=self.heartbeat_at)


def read_status(run_dir: Path) -> RunStatus:
    """The reconciled status of the run in `run_dir`; `queued` where no trainer has begun.

    Raises:
        RunError: `state.json` is damaged.
    """
    return _read_stored(run_dir).reconciled()


def _read_stored(run_dir: Path) -> RunStatus:
    stored = paths.read_json(run_dir / paths.STATE)
    try:
        status = _reader().validate_python(stored)
    except ValueError as error:
        raise paths.damaged(run_dir / paths.STATE, " ".join(str(error).split("\n")[1:3])) from None
    if status.status == "running" and (status.owner is None or status.heartbeat_at is None):
        raise paths.damaged(run_dir / paths.STATE, "a run that is running must have an owner and a heartbeat")
    return status


@functools.cache
def _reader() -> "TypeAdapter[RunStatus]":
    from pydantic import TypeAdapter

    return TypeAdapter(RunStatus)


@dataclass
class Ledger:
    """The owner's side of `state.json`, held together with the run's lock from `open` until `close`.

    The lock is flock(2) on `lock`: the kernel frees it however the process ends, so it is never stale.
    """

    run_dir: Path
    state: RunStatus
    waits_for_room: bool
    _lock_descriptor: int
    _session_began: float = field(default_factory=time.monotonic)
    _train_s_before: float = 0.0
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _finished: threading.Event = field(default_factory=threading.Event)
    _is_behind: bool = False

    @classmethod
    def open(cls, run_dir: Path, *, waits_for_room: bool = False) -> "Ledger":
        """Lock the run; `state` then is what its last owner left. Nothing is written before `begin`.

        Args:
            waits_for_room: on a disk that is full `update` leaves what is new to the next one; else it raises OSError.

        Raises:
            RunError: another process owns the run directory, it cannot be written in, or a link leads out of it.
        """
        paths.refuse_links_out(run_dir)
        try:
            descriptor = os.open(run_dir / paths.LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            raise RunError(
                f"a run directory must be writable, but {run_dir} is not ({error.strerror}); make it so, or copy the "
                "run to where you may write"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            owner = read_status(run_dir).pid
            raise RunError(
                f"a run directory must have one owner, but {run_dir} is owned by process {owner or '(starting)'}; "
                "wait for it, watch it from a notebook, or end it with Run.open(...).stop()"
            ) from None
        return cls(run_dir, _read_stored(run_dir), waits_for_room, descriptor)

    def begin(self, max_steps: int, unit: str = "step") -> None:
        """Write that this process is at work on the run, and keep the heartbeat fresh from now on."""
        paths.remove_abandoned_temporaries(self.run_dir)
        # Random bytes, since a file system may keep others in no room at all.
        paths.write_atomically(self._reserve, os.urandom(RESERVED_BYTES))
        before = self.state
        self._train_s_before = before.train_s
        self.state = replace(
            before,
            status="running",
            stage="starting",
            max_steps=max_steps,
            unit=unit,
            restarts=before.restarts + (before.status != "queued"),
            cause=None,
            message=None,
            owner=current_process(),
            started_at=before.started_at or time.time(),
            ended_at=None,
        )
        self._write()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    @property
    def train_s(self) -> float:
        """Seconds that trainers have spent on this run, all sessions together."""
        return self._train_s_before + time.monotonic() - self._session_began

    def update(self, **changes: object) -> None:
        """Note `changes`; they reach the disk with the next heartbeat, at once when `stage` changes."""
        with self._guard:
            at_once = "stage" in changes and changes["stage"] != self.state.stage
            self.state = replace(self.state, **changes)  # type: ignore[arg-type]
            heartbeat_at = self.state.heartbeat_at or 0.0
            if not at_once and abs(time.time() - heartbeat_at) < HEARTBEAT_EVERY_S:
                return
            try:
                self._write()
                self._is_behind = False
            except OSError as error:
                if not self.waits_for_room or not is_disk_full(error):
                    raise
                if not self._is_behind:
                    logger.warning("%s; the ledger is behind until there is room again", error)
                self._is_behind = True

    def finish(self, status: Status, *, stage: str, cause: str | None = None, message: str | None = None) -> None:
        """Write how the run ended: the last word. The lock stays until `close` or the process ends."""
        with self._guard:
            self.state = replace(
                self.state, status=status, stage=stage, cause=cause, message=message, ended_at=time.time()
            )
            self._reserve.unlink(missing_ok=True)
            try:
                self._write()
            except OSError as error:
                if status != "failed":
                    raise
                # What ended the run is on its way to the user, and matters more.
                logger.error("the ledger cannot say that the run failed (%s), since: %s", cause, error)
            self._finished.set()

    def close(self) -> None:
        """Give the run up."""
        self._finished.set()
        self._reserve.unlink(missing_ok=True)
        os.close(self._lock_descriptor)

    def _beat(self) -> None:
        while not self._finished.wait(IDLE_HEARTBEAT_EVERY_S):
            try:
                self.update()
            except OSError as error:
                # Whether the run ends by it is for its main thread to say, which writes too; this one stays for when
                # it can be written again.
                logger.warning("the heartbeat cannot be written: %s", error)

    @property
    def _reserve(self) -> Path:
        """Room that `finish` gives back, so that on a full disk the ledger can say that it is."""
        return self.run_dir / f".{paths.STATE}.reserve.{os.getpid()}.tmp"

    def _write(self) -> None:
        if self._finished.is_set():
            return
        state = replace(self.state, heartbeat_at=time.time(), train_s=self.train_s)
        paths.write_json(self.run_dir / paths.STATE, asdict(state))
        self.state = state

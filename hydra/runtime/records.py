"""Append-only JSON lines (metrics, samples), one object a line, and the TensorBoard copy of the numbers."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from hydra.errors import RunError
from hydra.runtime import paths
from hydra.runtime.disk import is_disk_full
from hydra.runtime.secrets import mask, mask_texts
from hydra.runtime.tracking import Tracker, TrackingMode

logger = logging.getLogger(__name__)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Every complete line of `path`, in order; [] where there is none. A line still being written is left out.

    Raises:
        RunError: a line is not what was written; the message names file and line.
    """
    return read_records_from(path, 0)[0]


def read_records_from(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Every complete line of `path` behind `offset` (bytes), and the offset behind the last of them.

    Raises:
        RunError: a line is not what was written; the message names file and line, counted from the offset.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read()
    except FileNotFoundError:
        return [], offset
    complete = content[: content.rfind(b"\n") + 1]
    lines = complete.split(b"\n")[:-1]
    return [_parse_record(path, number, line) for number, line in enumerate(lines, start=1)], offset + len(complete)


def _parse_record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise RunError(
            f"every line of {path} must be a JSON object with its step, but line {number} is damaged "
            f"({line[:40].decode(errors='replace')!r}); remove that line"
        )
    return record


def keep_records(path: Path, is_kept: Callable[[int], bool]) -> None:
    """Keep the records of those steps: what a resumed run will write again must not stand there twice."""
    kept = [record for record in read_records(path) if is_kept(record["step"])]
    paths.write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))


def append_record(path: Path, record: Mapping[str, object]) -> None:
    """Append one record, secrets masked; NaN and infinity are refused, since a reader could not parse them."""
    _append_line(path, _to_line(record))


def _to_line(record: Mapping[str, object]) -> bytes:
    return (json.dumps(mask_texts(record), allow_nan=False) + "\n").encode()


def _append_line(path: Path, line: bytes) -> None:
    """Append all of it, or nothing: behind half a line, which a full disk takes, the next would be lost too."""
    # Unbuffered, since a buffer that was refused is written once more when its file is closed.
    with paths.naming(path), open(path, "ab", buffering=0) as file:
        length = file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:
            file.truncate(length)
            raise


class MetricsWriter:
    """Writes `metrics.jsonl` and, from the same record, TensorBoard scalars under the same names; and other records.

    W&B, when asked for, gets its copy from a process that reads `metrics.jsonl`. Neither copy is needed for the run: a
    failure to write one is logged with what to do, and the run goes on.
    """

    def __init__(
        self,
        run_dir: Path,
        first_step: int,
        wandb_mode: TrackingMode,
        wandb_project: str,
        *,
        waits_for_room: bool = False,
    ) -> None:
        """Cut the records behind `first_step`, the step that a resumed run goes on from (0 for a new one).

        Args:
            waits_for_room: on a disk that is full keep records in memory until there is room again, and raise only in
                `sync`; else the record that is refused is an OSError.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._path = run_dir / paths.METRICS
        self._waits_for_room = waits_for_room
        self._unwritten: list[tuple[Path, bytes]] = []
        self._unsynced: set[Path] = set()
        keep_records(self._path, lambda step: step <= first_step)
        self._board: Any = None
        with self._dropped_if_it_fails():
            self._board = SummaryWriter(str(run_dir / paths.EVENTS), purge_step=first_step + 1)
        self._tracker = None if wandb_mode == "disabled" else Tracker(run_dir, wandb_mode, wandb_project)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, record: Mapping[str, float | int]) -> None:
        """Append the record to metrics.jsonl; its `step` places it."""
        self.append(self._path, record)
        if self._board is None:
            return
        with self._dropped_if_it_fails():
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(mask(name), value, global_step=int(record["step"]))

    def append(self, path: Path, record: Mapping[str, object]) -> None:
        """Append it to the records in `path`, of whatever kind; they reach the disk in the order they came in."""
        self._unwritten.append((path, _to_line(record)))
        try:
            self._write_waiting()
        except OSError as error:
            if not self._waits_for_room or not is_disk_full(error):
                raise
            if len(self._unwritten) == 1:
                logger.warning("%s; records are kept in memory until there is room again", error)

    def _write_waiting(self) -> None:
        while self._unwritten:
            path, line = self._unwritten[0]
            _append_line(path, line)
            self._unsynced.add(path)
            del self._unwritten[0]

    def sync(self) -> None:
        """Make all records durable, so that no checkpoint outlives the records before it.

        Raises:
            OSError: some still wait for room.
        """
        self._write_waiting()
        for path in self._unsynced:
            paths.sync_file(path)
        self._unsynced.clear()
        if self._board is not None:
            with self._dropped_if_it_fails():
                self._board.flush()

    def close(self) -> None:
        """Flush what TensorBoard and W&B do not have yet; the ledger must be finished. Takes seconds at most."""
        if self._board is not None:
            with self._dropped_if_it_fails():
                self._board.close()
        if self._tracker is not None:
            self._tracker.close()

    @contextlib.contextmanager
    def _dropped_if_it_fails(self) -> Iterator[None]:
        """TensorBoard's files may be lost, to a full disk say: the numbers are in metrics.jsonl."""
        try:
            yield
        except OSError as error:
            self._board = None
            logger.warning(
                "TensorBoard's copy of the metrics ends here, since it cannot be written: %s. They are complete in %s; "
                "with space on the disk, the next start of the run writes TensorBoard's copy from there on",
                error,
                self._path,
            )

"""Append-only JSON lines (metrics, samples), one object a line, and the TensorBoard copy of the numbers."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra.runtime import paths


def read_records(path: Path) -> list[dict[str, Any]]:
    """Every complete line of `path`, in order; [] where there is none. A line still being written is left out."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    complete = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in complete.splitlines()]


def keep_records(path: Path, is_kept: Callable[[int], bool]) -> None:
    """Keep the records of those steps: what a resumed run will write again must not stand there twice."""
    kept = [record for record in read_records(path) if is_kept(record["step"])]
    paths.write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))


def append_record(path: Path, record: Mapping[str, object]) -> None:
    """Append one record; NaN and infinity are refused, since a reader could not parse them."""
    with open(path, "a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


class MetricsWriter:
    """Writes `metrics.jsonl` and, from the same record, TensorBoard scalars under the same names."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        """Cut the records behind `first_step`, the step that a resumed run goes on from (0 for a new one)."""
        from torch.utils.tensorboard import SummaryWriter

        self._path = run_dir / paths.METRICS
        keep_records(self._path, lambda step: step <= first_step)
        self._board = SummaryWriter(str(run_dir / paths.EVENTS), purge_step=first_step + 1)

    def write(self, record: Mapping[str, float | int]) -> None:
        """Append the record; its `step` places it."""
        append_record(self._path, record)
        for name, value in record.items():
            if name != "step":
                self._board.add_scalar(name, value, global_step=int(record["step"]))

    def sync(self) -> None:
        """Make what was written durable, so that no checkpoint outlives the records before it."""
        paths.sync_file(self._path)
        self._board.flush()

    def close(self) -> None:
        """Flush what TensorBoard still holds."""
        self._board.close()

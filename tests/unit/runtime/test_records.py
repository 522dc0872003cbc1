"""Metrics: no line twice, none half, none that JSON cannot hold."""

import json
import os
from pathlib import Path

import pytest

from hydra.runtime import paths
from hydra.runtime.disk import is_disk_full
from hydra.runtime.records import MetricsWriter, append_record, keep_records, read_records
from hydra.testing import faults


def test_a_line_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / paths.METRICS
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_records(path) == [{"step": 1}, {"step": 2}]
    assert read_records(tmp_path / "none") == []


def test_what_is_kept_is_what_the_checkpoint_knows(tmp_path: Path) -> None:
    path = tmp_path / paths.METRICS
    for step in range(6):
        append_record(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 6, "loss')
    keep_records(path, lambda step: step <= 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


def test_a_record_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """The system itself refuses the second half, in a process of its own; there is room again for the next record."""
    path = tmp_path / paths.METRICS
    append_record(path, {"step": 1})
    child = os.fork()
    if child == 0:
        faults.file_size_limit(path.stat().st_size + 7)
        try:
            append_record(path, {"step": 2})
        except OSError as error:
            os._exit(28 if is_disk_full(error) and error.filename == str(path) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 28
    append_record(path, {"step": 3})
    assert read_records(path) == [{"step": 1}, {"step": 3}]


def test_not_a_number_never_reaches_the_disk(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        append_record(tmp_path / paths.METRICS, {"step": 1, "loss_nats": float("nan")})


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, 0, "disabled", "")
    writer.write({"step": 1, "loss_nats": 2.5})
    writer.write({"step": 2, "loss_nats": 2.25})
    writer.close()
    resumed = MetricsWriter(tmp_path, 1, "disabled", "")
    resumed.write({"step": 2, "loss_nats": 2.125})
    resumed.close()
    board = EventAccumulator(str(tmp_path / paths.EVENTS)).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss_nats")] == [(1, 2.5), (2, 2.125)]
    assert [record["loss_nats"] for record in read_records(tmp_path / paths.METRICS)] == [2.5, 2.125]

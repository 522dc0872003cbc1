"""Metrics: no line twice, none half, none that JSON cannot hold."""

import json
from pathlib import Path

import pytest

from hydra.runtime import paths
from hydra.runtime.records import MetricsWriter, append_record, keep_records, read_records


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

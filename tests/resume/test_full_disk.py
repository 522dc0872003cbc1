"""A disk that fills up under any file of a run: it ends with one message, or waits for room, and nothing is lost."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hydra.runtime import Run
from hydra.runtime.checkpoint import checkpoint_directory, newest_whole
from hydra.testing import storm

MakeRun = Callable[..., Path]
SHORT = {"max_steps": 24, "micro_batch_size": 2, "checkpoint_every": 4, "eval_every": 6, "log_every": 1}
LEDGER = ".state.json.[0-9]*"


@pytest.fixture(scope="module")
def undisturbed(make_run: MakeRun) -> Path:
    run_dir = make_run("undisturbed", **SHORT)
    storm.finish(run_dir)
    return run_dir


def left_over(run_dir: Path) -> list[Path]:
    return list(run_dir.glob(".*"))


@pytest.mark.parametrize(
    ("pattern", "named", "can_say_it"),
    [
        ("metrics.jsonl", "metrics.jsonl", True),
        ("samples.jsonl", "samples.jsonl", True),
        (LEDGER, "state.json", False),
    ],
)
def test_it_ends_with_one_message_and_goes_on_once_there_is_room(
    make_run: MakeRun, undisturbed: Path, pattern: str, named: str, can_say_it: bool
) -> None:
    run_dir = make_run("full", **SHORT)
    errors = storm.finish(run_dir, [{"fault": "full_disk", "pattern": pattern, "step": 12}], 1)
    assert errors.count(f"must be able to write {run_dir / named}, but the disk is full") == 1
    assert "Traceback" not in errors
    run = Run.open(run_dir)
    status = run.status()
    assert (status.status, status.cause) == (("failed", "disk full") if can_say_it else ("interrupted", "killed"))
    assert can_say_it or "cannot say that the run failed (disk full)" in errors
    assert run.metrics()[-1]["step"] in (11, 12)
    assert newest_whole(run_dir) == checkpoint_directory(run_dir, 8)
    assert left_over(run_dir) == []
    storm.finish(run_dir)
    assert storm.differences(run_dir, undisturbed) == []


def test_it_does_not_begin_without_room_for_its_ledger(make_run: MakeRun) -> None:
    run_dir = make_run("full", **SHORT)
    errors = storm.finish(run_dir, [{"fault": "full_disk", "pattern": ".state.json.*", "step": 0}], 1)
    assert "but the disk is full" in errors
    assert "Traceback" not in errors
    assert Run.open(run_dir).status().status == "queued"
    assert left_over(run_dir) == []


def test_the_system_lets_no_file_grow_while_the_log_is_standard_error(
    make_run: MakeRun, undisturbed: Path, moments: random.Random
) -> None:
    """As a notebook starts it. Which file is refused first, and whether half of it is written, is left to chance."""
    run_dir = make_run("limited", **SHORT)
    n_bytes = int(10 ** moments.uniform(2.0, 4.5))
    fault = {"fault": "file_size_limit", "n_bytes": n_bytes, "step": moments.randint(5, 20)}
    print(fault)
    faults = run_dir.with_name("faults.json")
    faults.write_text(json.dumps([fault]))
    with (run_dir / "trainer.log").open("a") as log:
        ended = subprocess.run(
            [sys.executable, "-m", "hydra.testing.faults", str(faults), storm.TRAINER, str(run_dir)],
            cwd=storm.ROOT,
            stderr=log,
            timeout=storm.TIMEOUT_S,
        )
    assert ended.returncode == 1
    log_text = (run_dir / "trainer.log").read_text()
    assert "Traceback" not in log_text
    assert "Logging error" not in log_text
    assert newest_whole(run_dir) is not None
    assert Run.open(run_dir).metrics()
    assert left_over(run_dir) == []
    storm.finish(run_dir)
    assert storm.differences(run_dir, undisturbed) == []


def test_a_run_may_wait_for_room_and_loses_no_record(make_run: MakeRun, undisturbed: Path) -> None:
    run_dir = make_run("waits", **SHORT, when_disk_is_full="go_on")
    errors = storm.finish(run_dir, [{"fault": "full_disk", "pattern": "*.json*", "step": 6, "last_step": 17}])
    assert errors.count("records are kept in memory until there is room again") == 1
    assert errors.count("the ledger is behind until there is room again") >= 1
    assert "a checkpoint of step 8 must be written, but the disk is full" in errors
    assert storm.differences(run_dir, undisturbed) == []


def test_a_run_that_waits_for_room_ends_only_with_what_it_says(make_run: MakeRun) -> None:
    """Asked to stop while the disk is full, it cannot say that its checkpoint is written."""
    run_dir = make_run("waits", **{**SHORT, "max_steps": 100_000}, when_disk_is_full="go_on")
    process = storm.start_trainer(run_dir, [{"fault": "full_disk", "pattern": "metrics.jsonl", "step": 6}])
    deadline = time.monotonic() + 60
    while "going on without it" not in Run.open(run_dir).log_tail(20):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    storm.kill_group(process, signal.SIGTERM)
    _, errors = process.communicate(timeout=storm.TIMEOUT_S)
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    status = Run.open(run_dir).status()
    assert (status.status, status.cause) == ("failed", "disk full")
    assert newest_whole(run_dir) == checkpoint_directory(run_dir, 4)


def test_copies_that_cannot_be_written_end_no_run(make_run: MakeRun, undisturbed: Path) -> None:
    run_dir = make_run("copies", **SHORT)
    errors = storm.finish(
        run_dir,
        [{"fault": "full_disk", "pattern": pattern, "step": 6} for pattern in ("events.out*", "trainer.log")],
    )
    assert errors.count("TensorBoard's copy of the metrics ends here") == 1
    assert errors.count("trainer.log may miss lines from here on") == 1
    assert "Traceback" not in errors
    assert storm.differences(run_dir, undisturbed) == []

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hydra.notebook.charts import decimate
from hydra.notebook.markup import Section, format_bytes, format_number, thin
from hydra.notebook.plan import Request
from hydra.notebook.progress import Progress, describe, format_duration
from hydra.notebook.watch import watch
from hydra.runtime import Run, RunStatus
from hydra.runtime.paths import next_free
from hydra.runtime.processes import current_process

# `hydra.notebook.watch` is the function, as DESIGN.md names it; this is the module it stands in.
watch_module = sys.modules["hydra.notebook.watch"]
NUMBERS = [0, 1, 1234567, 0.5, 1e-9, 2.5e9, -3.25, 999.99, None, "text"]


@pytest.fixture
def running(done_status: RunStatus) -> RunStatus:
    """A run whose trainer is this very process, hence alive."""
    now = time.time()
    return replace(done_status, status="running", stage="training", step=20, owner=current_process(), heartbeat_at=now)


def write_status(run: Run, status: RunStatus) -> None:
    temporary = run.directory / "state.tmp"
    temporary.write_text(json.dumps(asdict(status)))
    os.replace(temporary, run.directory / "state.json")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Section]:
    sections: list[Section] = []
    monkeypatch.setattr(Section, "show", lambda section: sections.append(section))
    return sections


def test_a_run_is_followed_to_its_end(
    make_run: Callable[..., Run],
    running: RunStatus,
    done_status: RunStatus,
    shown: list[Section],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(running)
    threading.Timer(0.8, write_status, (run, done_status)).start()
    began = time.monotonic()
    watch(run)
    assert time.monotonic() - began >= 0.8
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 20/50 | loss 4.0000 | 12,345 tokens/s | 0 s left",
        "job is done at step 50 of 50, 2 min 05 s in all; validation 1.462 bits per byte",
    ]
    assert len(shown) == 1
    assert "goes from 4.98 at step 1 to 4 at step 50" in shown[0].text


def test_a_failed_run_is_told_and_not_raised(
    make_run: Callable[..., Run], done_status: RunStatus, shown: list[Section], capsys: pytest.CaptureFixture[str]
) -> None:
    watch(make_run(replace(done_status, status="failed", cause="not finite", message="loss must be finite")))
    told = capsys.readouterr().out
    assert "job is failed at step 50 of 50" in told
    assert "not finite: loss must be finite" in told
    assert "first line" in told
    assert len(shown) == 1


def test_a_trainer_that_vanished_is_not_waited_for(
    make_run: Callable[..., Run], running: RunStatus, shown: list[Section], capsys: pytest.CaptureFixture[str]
) -> None:
    assert running.owner is not None
    watch(make_run(replace(running, owner=replace(running.owner, start_ticks=1))))
    assert "ended without a word" in capsys.readouterr().out


def test_interrupting_ends_the_watching_only(
    make_run: Callable[..., Run],
    running: RunStatus,
    shown: list[Section],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch_module.time, "sleep", interrupt)
    watch(make_run(running))
    assert f"stopped watching at step 20; the run goes on as process {os.getpid()}" in capsys.readouterr().out
    assert len(shown) == 1


def test_a_run_that_nobody_starts(
    make_run: Callable[..., Run],
    shown: list[Section],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch_module, "BEGIN_WITHIN_S", 0.2)
    watch(make_run(RunStatus()))
    assert "no trainer has begun" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({}, "step 20/50"),
        ({"loss_nats": 1.23456}, "step 20/50 | loss 1.2346"),
        (
            {"loss_nats": 2.0, "tokens_per_s": 5e4, "step_ms": 4000.0},
            "step 20/50 | loss 2.0000 | 50,000 tokens/s | 2 min 00 s left",
        ),
    ],
)
def test_one_line_of_progress(running: RunStatus, record: Mapping[str, object], told: str) -> None:
    assert describe(running, record) == told


@pytest.mark.parametrize(("seconds", "told"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (3725, "1 h 02 min")])
def test_durations(seconds: float, told: str) -> None:
    assert format_duration(seconds) == told


def test_numbers_and_sizes() -> None:
    assert [format_number(value) for value in NUMBERS] == [
        "0",
        "1",
        "1,234,567",
        "0.5",
        "1.00e-09",
        "2.50e+09",
        "-3.25",
        "1,000",
        "–",
        "text",
    ]
    assert [format_bytes(n) for n in (0, 999, 20_400_000, 3e12, 5e15)] == [
        "0 B",
        "999 B",
        "20.4 MB",
        "3 TB",
        "5e+03 TB",
    ]


def test_decimation_keeps_the_spike_the_ends_and_the_order() -> None:
    x = list(range(100_000))
    y = [0.0] * 100_000
    y[54_321], y[54_322] = 7.0, -7.0
    kept_x, kept_y = decimate(x, y)
    assert len(kept_x) == len(kept_y) <= 2000
    assert kept_x == sorted(kept_x)
    assert (max(kept_y), min(kept_y)) == (7.0, -7.0)
    assert kept_x[0] == 0
    assert decimate(x[:10], y[:10]) == (x[:10], y[:10])


def test_thinned_tables_keep_the_first_and_the_last_row() -> None:
    rows = thin([(n,) for n in range(1000)], 40)
    assert (len(rows), rows[0], rows[-1]) == (40, (0,), (999,))
    assert thin([(1,)], 40) == [(1,)]


def test_the_command_names_the_run_directory_where_it_is_not_the_usual_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    usual = tmp_path / "runs" / "job"
    request = Request(notebook="job.ipynb", notebook_name="job", parameters={}, run_dir=usual)
    head = "papermill job.ipynb runs/job"
    assert request.command("hydra", ["-r", "text", "a b"], usual) == f"{head}/job.ipynb --engine hydra -r text 'a b'"
    usual.mkdir(parents=True)
    (tmp_path / "runs" / "job-2").mkdir()
    free = next_free(usual)
    assert free.name == "job-3"
    assert request.command("hydra", [], free) == f"{head}-3/job.ipynb --engine hydra -r run_dir runs/job-3"
    assert (
        request.command("hydra", [], Path("/x/y"))
        == "papermill job.ipynb /x/y/job.ipynb --engine hydra -r run_dir /x/y"
    )


def test_a_run_at_work_says_first_what_one_should_know_of_it(
    make_run: Callable[..., Run], running: RunStatus, capsys: pytest.CaptureFixture[str]
) -> None:
    status = replace(running, unit="run", step=0, max_steps=45, stage="equal flops: mla, seed 0", message="left out: x")
    run = make_run(status)
    with Progress(run, 20, shown=True):
        time.sleep(1.2)
    assert capsys.readouterr().err.splitlines() == [
        "left out: x",
        "cell 1/20 | run 0/45 | equal flops: mla, seed 0 | loss 4.0000 | 12,345 tokens/s",
    ]


def test_a_run_that_was_cut_off_is_not_said_to_be_stopped_when_it_goes_on(
    make_run: Callable[..., Run], running: RunStatus, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = replace(
        running, status="interrupted", unit="run", step=12, max_steps=45, stage="stopped", cause="SIGTERM"
    )
    run = make_run(stopped, n_records=0)
    with Progress(run, 20, shown=True):
        time.sleep(1.2)
    assert capsys.readouterr().err.splitlines() == ["cell 1/20 | goes on from run 12/45"]

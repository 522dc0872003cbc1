"""What happens to a scheduled notebook: nothing is told "ok" that is not, and the next call goes on with the run."""

import json
import operator
import os
import resource
import signal
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import nbformat
import pytest

Workplace = Any


def code_cells(workplace: Workplace) -> list[Any]:
    """Of the saved notebook, which must parse and be valid whatever happened."""
    notebook = workplace.read()
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_proven(workplace: Workplace) -> bool:
    """Whether every cell was executed to its end, without an error."""
    return all(
        cell.execution_count is not None
        and cell.metadata.papermill.status == "completed"
        and not [output for output in cell.outputs if output.output_type == "error"]
        for cell in code_cells(workplace)
    )


def is_told_ok(workplace: Workplace) -> bool:
    """What somebody would believe who reads papermill's record alone."""
    return not workplace.read().metadata.papermill.exception and not [
        cell for cell in code_cells(workplace) if cell.metadata.papermill.status != "completed"
    ]


def printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def steps(workplace: Workplace) -> list[int]:
    return [json.loads(line)["step"] for line in (workplace.run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_goes_on(workplace: Workplace, *arguments: str, n_faults: int = 1) -> None:
    """The same command ends well, with the run that was cut off and no other."""
    before = steps(workplace)
    assert workplace.state()["status"] == "interrupted"
    done = workplace.run(*arguments)
    assert done.returncode == 0, done.stderr
    assert is_proven(workplace)
    assert is_told_ok(workplace)
    assert (workplace.state()["status"], workplace.state()["restarts"]) == ("done", n_faults)
    assert steps(workplace)[: len(before)] == before
    assert len(steps(workplace)) > len(before)
    assert "It did not end well" not in workplace.report()


WATCH = "from hydra.notebook import watch\nwatch(run)\nrun.raise_for_status()"
WAIT = "import time\nfrom pathlib import Path\nwhile not Path('go').exists():\n    time.sleep(0.05)"
TIMEOUT_S = 10
FAULTS = [
    ("KernelDied", "import os, signal\n    os.kill(os.getpid(), signal.SIGKILL)"),
    ("KernelDied", "import os\n    os._exit(0)"),
    # It answers nothing and notices no signal that can be caught: the interpreter's lock is held.
    ("CellTimeout", "import ctypes\n    ctypes.PyDLL(None).sleep(100_000)"),
]


@pytest.fixture
def train_source(start_trainer_source: str) -> Callable[[int], str]:
    """train_source(n): a cell that starts a trainer, which does not end by itself before it was cut off n times."""

    def source(n_faults: int) -> str:
        restarts = "Run(run_directory()).status().restarts if (run_directory() / 'state.json').exists() else -1"
        ends = f"Run(run_directory()).status().step + 5 if ({restarts}) + 1 == {n_faults} else 100_000"
        return start_trainer_source.replace("N_STEPS", ends)

    return source


def test_a_fault_in_a_cell(workplace: Workplace, train_source: Callable[[int], str]) -> None:
    """One in each call, while the trainer is at work: that ends with a checkpoint, and is no orphan."""
    faults = [f"if run.status().restarts == {n}:\n    {source}" for n, (_, source) in enumerate(FAULTS)]
    workplace.write_notebook(train_source(len(FAULTS)), "\n".join(faults), WATCH)
    arguments = ["--execution-timeout", str(TIMEOUT_S)]
    for name, _ in FAULTS:
        done = workplace.run(*arguments)
        assert done.returncode == 75, done.stderr
        assert "Traceback" not in done.stderr
        assert workplace.left_behind() == []
        assert workplace.read().metadata.papermill.exception is True
        assert not is_told_ok(workplace)
        assert workplace.statuses() == ["completed", "completed", "failed", "pending"]
        ended = code_cells(workplace)[2]
        assert [output.ename for output in ended.outputs] == [name]
        assert name in workplace.report()
    times = (datetime.fromisoformat(ended.metadata.papermill[key]) for key in ("end_time", "start_time"))
    assert TIMEOUT_S <= operator.sub(*times).total_seconds() < TIMEOUT_S + 5
    assert_goes_on(workplace, *arguments, n_faults=len(FAULTS))


def test_100_mb_of_output(workplace: Workplace) -> None:
    """However it comes, a cell leaves a megabyte, and a word on how much more there was."""
    n, n_each = 100_000_000, 5_000_000
    workplace.write_notebook(
        f"for _ in range(100):\n    print('x' * {n // 100 - 1}, flush=True)\nprint('unseen')",
        f"'x' * {n_each}",
        f"shown = display('x', display_id=True)\nshown.update('x' * {n_each})",
        "display('x' * 990_000)\nsame = display('x', display_id=True)",
        "display('x', display_id=same.display_id)\nsame.update('x' * 20_000)",
        "'still there'",
        f"raise ValueError('x' * {n_each})",
    )
    done = workplace.run("--stdout-file", "all.txt")
    assert done.returncode == 1
    assert len(done.stderr) < 10_000
    assert workplace.output.stat().st_size < 2_500_000
    assert len(workplace.report()) < 2_000_000
    _, lines, value, display, full, empty, after, error = code_cells(workplace)
    assert printed(lines).count("x") == 1_000_000 - 1
    assert f"[HYDRA cut the output of this cell here: {n - 1_000_000 + 7:,} bytes more" in printed(lines)
    assert "unseen" not in printed(lines)
    assert f"{n - 1_000_000 + 7:,} bytes more" in workplace.report()
    assert (workplace.root / "all.txt").stat().st_size == n + 7
    assert "bytes more" in printed(value)
    assert "left out a display" in display.outputs[0].data["text/plain"]
    # What two cells show must have room in both.
    assert "left out a display" in full.outputs[-1].data["text/plain"]
    assert full.outputs[-1].data == empty.outputs[0].data
    assert after.outputs[0].data["text/plain"] == "'still there'"
    assert "characters here]" in error.outputs[0].evalue


def test_papermill_is_killed_in_the_middle_of_a_save(
    workplace: Workplace, train_source: Callable[[int], str], wait_until: Callable[..., None]
) -> None:
    figures = "for _ in range(60):\n    display({'text/plain': 'x' * 15_000}, raw=True)"
    workplace.write_notebook(train_source(1), *[figures] * 8, WATCH)
    job = workplace.begin()
    wait_until(lambda: (workplace.run_dir / "metrics.jsonl").exists())
    half = workplace.run_dir / f".job.ipynb.{job.pid}.tmp"
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline
        if half.exists():
            os.kill(job.pid, signal.SIGSTOP)
            if half.exists():  # and it will be: a save that comes to its end takes the name away
                break
            os.kill(job.pid, signal.SIGCONT)
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    wait_until(lambda: workplace.left_behind() == [], timeout_s=10)
    assert half.exists()
    assert not is_told_ok(workplace)
    assert_goes_on(workplace)
    assert not half.exists()


def test_a_full_disk(workplace: Workplace, train_source: Callable[[int], str], wait_until: Callable[..., None]) -> None:
    """papermill may write no file any more, of any size; its kernel and the trainer may."""
    workplace.write_notebook(train_source(1), WAIT, WATCH)
    job = workplace.begin()
    wait_until(lambda: workplace.output.exists() and workplace.statuses()[2] == "running")
    saved = workplace.output.read_bytes()
    resource.prlimit(job.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    (workplace.root / "go").touch()
    _, err = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "runs/job/job.ipynb must be written, but the disk is full" in err
    assert "make room and give the same command again: papermill job.ipynb runs/job/job.ipynb" in err
    assert "Traceback" not in err
    assert workplace.output.read_bytes() == saved
    assert not is_told_ok(workplace)
    assert not list(workplace.run_dir.glob(".*.tmp"))
    assert workplace.left_behind() == []
    assert_goes_on(workplace)


def test_a_disk_that_is_full_from_the_start(workplace: Workplace) -> None:
    workplace.write_notebook("open('kernel-was-here', 'w')")
    done = workplace.run(before=["prlimit", "--fsize=0"])
    assert done.returncode == 1
    assert "must be written, but the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workplace.root / "kernel-was-here").exists()


def test_a_disk_that_is_full_for_a_while(workplace: Workplace, wait_until: Callable[..., None]) -> None:
    """A cell at work is not ended for it: what it printed is saved at its end."""
    lines = "import time\nfor i in range(6):\n    print(i, flush=True)\n    time.sleep(0.5)"
    workplace.write_notebook(lines)
    job = workplace.begin("--autosave-cell-every", "1")
    wait_until(lambda: workplace.output.exists() and workplace.statuses()[1] == "running")
    resource.prlimit(job.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    time.sleep(1.5)
    resource.prlimit(job.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    _, err = job.communicate(timeout=60)
    assert job.returncode == 0, err
    assert "the disk is full" in err
    assert "the cell goes on" in err
    assert printed(code_cells(workplace)[1]).split() == [str(i) for i in range(6)]
    assert is_proven(workplace)


def test_a_schedule_fires_while_the_run_before_lives(
    workplace: Workplace, start_trainer_source: str, wait_until: Callable[..., None]
) -> None:
    """The later one ends at once and touches nothing; the first ends as if nothing had been."""
    workplace.write_notebook(start_trainer_source.replace("N_STEPS", "20"), WAIT, WATCH)
    first = workplace.begin()
    wait_until(lambda: workplace.output.exists() and workplace.statuses()[2] == "running")
    wait_until(lambda: workplace.state()["status"] == "done")
    before = {path: path.stat().st_mtime_ns for path in workplace.run_dir.rglob("*")}
    later = workplace.run()
    assert later.returncode == 75
    assert f"process {first.pid} executes job on runs/job" in later.stderr
    assert "the same command goes on: papermill job.ipynb runs/job/job.ipynb" in later.stderr
    assert "Traceback" not in later.stderr
    assert {path: path.stat().st_mtime_ns for path in workplace.run_dir.rglob("*")} == before
    (workplace.root / "go").touch()
    _, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    assert is_proven(workplace)
    assert workplace.run().returncode == 0


def test_two_runs_save_as_the_same_output(workplace: Workplace) -> None:
    """Each save is whole, the last one stays, and each run keeps its own notebook."""
    waits = "import time\nfrom hydra.notebook import run_directory\nfor _ in range(5):\n    time.sleep(0.2)"
    workplace.write_notebook(*[waits] * 3, "run_directory().name")
    jobs = [workplace.begin("-r", "run_dir", f"runs/{name}", output="out.ipynb") for name in ("a", "b")]
    output, n_read = workplace.root / "out.ipynb", 0
    while any(job.poll() is None for job in jobs):
        if output.exists():
            nbformat.validate(nbformat.read(output, as_version=4))
            n_read += 1
    assert [job.wait() for job in jobs] == [0, 0]
    assert n_read > 20
    kept = {name: workplace.root / "runs" / name / "job.ipynb" for name in ("a", "b")}
    for name, path in kept.items():
        assert f"'{name}'" in nbformat.read(path, as_version=4).cells[-1].outputs[0].data["text/plain"]
    assert output.read_text() in {path.read_text() for path in kept.values()}

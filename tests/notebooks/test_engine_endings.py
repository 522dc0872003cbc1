"""However a batch run ends: the notebook, the report and the exit status tell it, and nothing stays behind."""

import contextlib
import os
import pty
import re
import signal
import termios
import time
from collections.abc import Callable
from typing import Any

import pytest
from bs4 import BeautifulSoup

Workplace = Any


def error_of(cell: Any) -> Any:
    (error,) = [output for output in cell.outputs if output.output_type == "error"]
    return error


def test_all_is_well(workplace: Workplace, start_trainer_source: str) -> None:
    source = start_trainer_source.replace("N_STEPS", "n_steps")
    workplace.write_notebook(
        source, "watch(run)\nrun.raise_for_status()", parameters="# Parameters: one\nn_steps = 900"
    )
    done = workplace.run("-p", "n_steps", "10", "-p", "text", "x")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "validation: 1.500 bits per byte (2.500 nats per token)",
        "report: runs/job/report.html",
    ]
    assert "unknown parameter" not in done.stderr
    assert "TCP" not in done.stderr
    assert set(workplace.statuses()) == {"completed"}
    assert workplace.state()["max_steps"] == 10
    assert "job is done at step 10 of 10" in workplace.read().cells[-1].outputs[0].text
    assert "1.500 bits per byte" in workplace.report()
    assert workplace.left_behind() == []


def test_a_rejected_command_starts_and_writes_nothing(workplace: Workplace) -> None:
    workplace.write_notebook("open('kernel-was-here', 'w')")
    before = sorted(workplace.root.rglob("*"))
    began = time.monotonic()
    done = workplace.run("-p", "n_stps", "3")
    assert (done.returncode, time.monotonic() - began < 5) == (2, True)
    assert "Error: n_stps: there is no such parameter" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(workplace.root.rglob("*")) == before


def test_kernel_death(workplace: Workplace) -> None:
    kill_self = "import os, time\nprint('last words', flush=True)\ntime.sleep(0.3)\nos.kill(os.getpid(), 9)"
    workplace.write_notebook("1 + 1", kill_self, "'never'")
    done = workplace.run()
    assert done.returncode == 75, done.stderr
    assert "papermill job.ipynb runs/job/job.ipynb --engine fake" in done.stderr
    assert workplace.statuses() == ["completed", "completed", "failed", "pending"]
    notebook = workplace.read()
    assert notebook.metadata.papermill.exception is True
    assert notebook.cells[2].outputs[0].text == "last words\n"
    assert error_of(notebook.cells[2]).ename == "KernelDied"
    assert "KernelDied: the kernel was killed" in workplace.report()
    assert workplace.left_behind() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_the_job_is_told_to_end(
    workplace: Workplace, start_trainer_source: str, wait_until: Callable[..., None], number: signal.Signals
) -> None:
    workplace.write_notebook(start_trainer_source.replace("N_STEPS", "100_000"), "watch(run)", "'never'")
    job = workplace.begin()
    wait_until(lambda: (workplace.run_dir / "metrics.jsonl").exists())
    wait_until(lambda: workplace.statuses()[2] == "running")
    time.sleep(1)
    began = time.monotonic()
    os.kill(job.pid, number)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 75, err
    assert time.monotonic() - began < 15
    assert "The same command goes on: papermill job.ipynb" in err
    assert workplace.statuses() == ["completed", "completed", "failed", "pending"]
    assert f"ended by {number.name}" in error_of(workplace.read().cells[2]).evalue
    assert (workplace.state()["status"], workplace.state()["cause"]) == ("interrupted", "SIGTERM")
    assert "interrupted" in workplace.report()
    assert workplace.left_behind() == []


def test_papermill_is_killed(workplace: Workplace, start_trainer_source: str, wait_until: Callable[..., None]) -> None:
    """Nothing can be written then, but no process stays, the trainer ends by itself, and the next call mends all."""
    finite = "100_000 if not (run_directory() / 'state.json').exists() else Run.open(run_directory()).status().step + 5"
    source = start_trainer_source.replace("N_STEPS", finite)
    workplace.write_notebook(source, "watch(run)\nrun.raise_for_status()")
    job = workplace.begin()
    wait_until(lambda: (workplace.run_dir / "metrics.jsonl").exists())
    os.kill(job.pid, signal.SIGKILL)
    wait_until(lambda: workplace.left_behind() == [], timeout_s=10)
    assert workplace.state()["status"] == "interrupted"
    assert workplace.run().returncode == 0
    assert set(workplace.statuses()) == {"completed"}
    assert "restarts</dt><dd>1<" in workplace.report()


def test_a_run_of_somebody_else_goes_on(
    workplace: Workplace, start_trainer_source: str, wait_until: Callable[..., None]
) -> None:
    attach = "from hydra.notebook import run_directory, watch\nfrom hydra.runtime import Run\n"
    workplace.write_notebook(attach + "run = Run.open(run_directory())\nwatch(run)")
    detached = start_trainer_source.replace("run_directory()", f"Path({str(workplace.run_dir)!r})")
    detached = detached.replace("N_STEPS)", "100_000, dies_with_caller=False)")
    exec(detached, {})
    job = workplace.begin()
    wait_until(lambda: workplace.output.exists() and workplace.statuses()[1] == "running")
    time.sleep(1)
    os.kill(job.pid, signal.SIGTERM)
    _, err = job.communicate(timeout=60)
    owner = workplace.state()["owner"]["pid"]
    try:
        assert job.returncode == 75
        assert f"The run goes on as process {owner}" in err
        assert workplace.state()["status"] == "running"
    finally:
        os.kill(owner, signal.SIGTERM)
        wait_until(lambda: workplace.state()["status"] == "interrupted")


def test_a_cell_raises(workplace: Workplace, start_trainer_source: str) -> None:
    """While the trainer is at work: the notebook is to blame, and its trainer is ended."""
    workplace.write_notebook(
        start_trainer_source.replace("N_STEPS", "100_000"), "raise ValueError('<script>alert(1)</script>')", "'never'"
    )
    done = workplace.run()
    assert done.returncode == 1
    assert "ValueError" in done.stderr
    notebook = workplace.read()
    assert "An Exception was encountered" in notebook.cells[0].source
    assert [cell.metadata.papermill.status for cell in notebook.cells if cell.cell_type == "code"] == [
        "completed",
        "completed",
        "failed",
        "pending",
    ]
    assert workplace.state()["status"] == "interrupted"
    soup = BeautifulSoup(workplace.report(), "html.parser")
    assert soup.find(class_="failure").get_text().count("<script>alert(1)</script>") == 1
    assert soup.find("script") is None
    assert workplace.left_behind() == []


def test_the_trainer_was_cut_off(workplace: Workplace, start_trainer_source: str) -> None:
    stop = "import time\ntime.sleep(1)\nrun.stop()\nrun.raise_for_status()"
    workplace.write_notebook(start_trainer_source.replace("N_STEPS", "100_000"), stop)
    done = workplace.run()
    assert done.returncode == 75, done.stderr
    assert "is not done but interrupted" in done.stderr
    assert "The run was cut off at step" in workplace.report()


def test_a_cell_takes_too_long(workplace: Workplace) -> None:
    workplace.write_notebook("import time\nprint('begun')\ntime.sleep(60)", "'never'")
    done = workplace.run("--execution-timeout", "2")
    assert done.returncode == 1, done.stderr
    assert "Error: CellTimeout: the cell took longer" in done.stderr
    assert "Traceback" not in done.stderr
    assert workplace.statuses() == ["completed", "failed", "pending"]
    assert error_of(workplace.read().cells[1]).ename == "CellTimeout"
    assert "CellTimeout" in workplace.report()
    assert workplace.left_behind() == []


def test_sys_exit_with_success_ends_the_notebook_early(workplace: Workplace) -> None:
    workplace.write_notebook("import sys\nsys.exit(0)", "'never'")
    assert workplace.run().returncode == 0
    assert workplace.statuses() == ["completed", "failed", "pending"]


def test_sys_exit_with_failure_is_a_failure(workplace: Workplace) -> None:
    workplace.write_notebook("import sys\nsys.exit(3)", "'never'")
    assert workplace.run().returncode == 1
    assert workplace.read().metadata.papermill.exception is True
    assert "SystemExit: 3" in workplace.report()


def test_a_notebook_that_leaves_its_run_undone_is_not_well(workplace: Workplace, start_trainer_source: str) -> None:
    workplace.write_notebook(start_trainer_source.replace("N_STEPS", "100_000"), "import sys\nsys.exit(0)")
    assert workplace.run().returncode == 75


def test_progress_is_drawn_from_the_run_directory(workplace: Workplace, start_trainer_source: str) -> None:
    workplace.write_notebook(start_trainer_source.replace("N_STEPS", "40"), "watch(run)\nrun.raise_for_status()")
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    job = workplace.begin(stderr=terminal)
    os.close(terminal)
    drawn = b""
    with contextlib.suppress(OSError):  # a terminal whose last user has gone
        while chunk := os.read(screen, 4096):
            drawn += chunk
    assert job.wait() == 0
    text = drawn.decode()
    assert "cell 1/3" in text
    assert re.search(r"cell 3/3 \| step \d+/40 \| loss \d\.\d+ \| 100 tokens/s \| \d+ s left +\d+%\|", text)
    assert "100%|" in text
    assert "Executing:" not in text


def test_output_is_merged(workplace: Workplace) -> None:
    lines = "import sys, time\nfor i in range(300):\n    print(f'line {i}', flush=True)\n"
    bar = "for i in range(50):\n    print(f'\\rbar {i}', end='', file=sys.stderr, flush=True)\n"
    workplace.write_notebook(lines + bar)
    assert workplace.run().returncode == 0
    first = workplace.read().cells[1]
    assert {(output.name, output.text.count("\n")) for output in first.outputs} == {("stdout", 300), ("stderr", 0)}
    assert len(first.outputs) == 2
    assert [output.text for output in first.outputs if output.name == "stderr"] == ["bar 49"]


def test_the_notebook_is_kept_with_the_run(workplace: Workplace) -> None:
    workplace.write_notebook("1 + 1")
    assert workplace.run(output="elsewhere/out.ipynb").returncode == 0
    assert workplace.output.read_text() == (workplace.root / "elsewhere/out.ipynb").read_text()
    assert not list(workplace.root.rglob("*.tmp"))


def test_other_engines_keep_their_warning(workplace: Workplace) -> None:
    workplace.write_notebook("1")
    done = workplace.run("-p", "whatever", "1", "--engine", "nbclient", output="other.ipynb")
    assert done.returncode == 0, done.stderr
    assert "Passed unknown parameter: whatever" in done.stderr

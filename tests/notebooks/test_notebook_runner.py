"""What happens to a scheduled notebook: nothing is told "ok" that is not, and the next call goes on with the run."""

import json
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


def assert_goes_on(workplace: Workplace, *arguments: str) -> None:
    """The same command ends well, with the run that was cut off and no other."""
    steps = [json.loads(line)["step"] for line in (workplace.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert workplace.state()["status"] == "interrupted"
    done = workplace.run(*arguments)
    assert done.returncode == 0, done.stderr
    assert is_proven(workplace)
    assert is_told_ok(workplace)
    assert (workplace.state()["status"], workplace.state()["restarts"]) == ("done", 1)
    again = [json.loads(line)["step"] for line in (workplace.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert again[: len(steps)] == steps
    assert len(again) > len(steps)
    assert "It did not end well" not in workplace.report()


@pytest.fixture
def train_source(start_trainer_source: str) -> str:
    """A cell that starts a trainer which does not end by itself, and goes on with one that was cut off for 5 steps."""
    is_new = "not (run_directory() / 'state.json').exists()"
    return start_trainer_source.replace(
        "N_STEPS", f"100_000 if {is_new} else Run.open(run_directory()).status().step + 5"
    )


TIMEOUT_S = 10
FAULTS = {
    "SIGKILL": ("import os, signal\n    os.kill(os.getpid(), signal.SIGKILL)", "KernelDied", 75),
    "_exit": ("import os\n    os._exit(0)", "KernelDied", 75),
    # It answers nothing, and notices no signal that can be caught: the interpreter's lock is held.
    "hang": ("import ctypes\n    ctypes.PyDLL(None).sleep(100_000)", "CellTimeout", 75),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_cell(workplace: Workplace, train_source: str, fault: str) -> None:
    """At its first execution, while the trainer is at work: that ends with a checkpoint and is no orphan."""
    source, name, exit_status = FAULTS[fault]
    once = f"if run.status().restarts == 0:\n    {source}"
    workplace.write_notebook(train_source, once, "from hydra.notebook import watch\nwatch(run)\nrun.raise_for_status()")
    arguments = ["--execution-timeout", str(TIMEOUT_S)]
    done = workplace.run(*arguments)
    assert done.returncode == exit_status, done.stderr
    assert "Traceback" not in done.stderr
    assert workplace.left_behind() == []
    assert not is_told_ok(workplace)
    assert [cell.metadata.papermill.status for cell in code_cells(workplace)] == [
        "completed",
        "completed",
        "failed",
        "pending",
    ]
    record = code_cells(workplace)[2]
    assert [output.ename for output in record.outputs] == [name]
    assert name in workplace.report()
    if fault == "hang":
        began, ended = (record.metadata.papermill[key] for key in ("start_time", "end_time"))
        taken_s = (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds()
        assert TIMEOUT_S <= taken_s < TIMEOUT_S + 5
    assert_goes_on(workplace, *arguments)


def test_100_mb_of_output(workplace: Workplace) -> None:
    """However it comes, a cell leaves a megabyte, and a word on how much more there was."""
    n, n_each = 100_000_000, 5_000_000
    workplace.write_notebook(
        f"for _ in range(100):\n    print('x' * {n // 100 - 1})\nprint('unseen')",
        f"'x' * {n_each}",
        f"shown = display('x', display_id=True)\nshown.update('x' * {n_each})",
        "'still there'",
        f"raise ValueError('x' * {n_each})",
    )
    done = workplace.run("--stdout-file", "all.txt")
    assert done.returncode == 1
    assert len(done.stderr) < 10_000
    assert workplace.output.stat().st_size < 1_500_000
    assert len(workplace.report()) < 1_000_000
    _, lines, value, display, after, error = code_cells(workplace)
    assert printed(lines).count("x") == 1_000_000 - 1
    assert f"[HYDRA cut the output of this cell here: {n - 1_000_000 + 7:,} bytes more" in printed(lines)
    assert "unseen" not in printed(lines)
    assert f"{n - 1_000_000 + 7:,} bytes more" in workplace.report()
    assert (workplace.root / "all.txt").stat().st_size == n + 7
    assert "bytes more" in printed(value)
    assert "left out a display" in display.outputs[0].data["text/plain"]
    assert after.outputs[0].data["text/plain"] == "'still there'"
    assert "characters here]" in error.outputs[0].evalue

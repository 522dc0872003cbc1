"""Batch runs of throw-away notebooks in a folder of their own, by papermill's command in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import psutil
import pytest

HERE = Path(__file__).parent


@dataclass
class Workplace:
    """A folder outside the checkout (so it is its own workspace root) with one notebook, `job.ipynb`, in it."""

    root: Path
    processes: list["subprocess.Popen[str]"] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.root / "runs" / "job"

    @property
    def output(self) -> Path:
        return self.run_dir / "job.ipynb"

    def write_notebook(self, *sources: str, parameters: str = "# Parameters: none") -> None:
        cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
        cells += [nbformat.v4.new_code_cell(source) for source in sources]
        kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), self.root / "job.ipynb")

    def begin(
        self,
        *arguments: str,
        output: str = "runs/job/job.ipynb",
        stderr: int = subprocess.PIPE,
        before: Sequence[str] = (),
    ) -> "subprocess.Popen[str]":
        """Start papermill's command, behind the words of a command `before` that becomes it."""
        command = [
            *before,
            sys.executable,
            str(HERE / "fake_engine.py"),
            "job.ipynb",
            output,
            "--engine",
            "fake",
            *arguments,
        ]
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            # So a shell starts what it runs in the background, these tests among it, and children inherit it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            command, cwd=self.root, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
        )
        self.processes.append(process)
        return process

    def run(
        self, *arguments: str, output: str = "runs/job/job.ipynb", before: Sequence[str] = ()
    ) -> "subprocess.CompletedProcess[str]":
        process = self.begin(*arguments, output=output, before=before)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def read(self) -> nbformat.NotebookNode:
        return nbformat.read(self.output, as_version=4)

    def statuses(self) -> list[str]:
        return [cell.metadata.papermill.status for cell in self.read().cells]

    def state(self) -> dict[str, object]:
        return json.loads((self.run_dir / "state.json").read_text())

    def report(self) -> str:
        return (self.run_dir / "report.html").read_text()

    def left_behind(self) -> list[str]:
        """Command lines of living processes that work in this folder."""
        found = []
        for process in psutil.process_iter(["cmdline", "cwd", "status"]):
            inside = str(process.info["cwd"] or "").startswith(str(self.root))
            if inside and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.info["cmdline"] or []))
        return found


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Workplace]:
    place = Workplace(tmp_path)
    yield place
    for process in place.processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    def wait(holds: Callable[[], object], timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, "it did not come about in time"
            time.sleep(0.05)

    return wait


@pytest.fixture(scope="session")
def start_trainer_source() -> str:
    """A cell that starts the fake trainer on the notebook's run directory and waits until an old end is history."""
    return (
        f"import sys, time; sys.path.insert(0, {str(HERE)!r})\n"
        "from pathlib import Path\n"
        "from fake_engine import start_trainer\n"
        "from hydra.notebook import run_directory, watch\n"
        "from hydra.runtime import Run\n"
        "run_directory().mkdir(parents=True, exist_ok=True)\n"
        "(run_directory() / 'config.json').write_text('{}')\n"
        "start_trainer(run_directory(), N_STEPS)\n"
        "run, deadline = Run.open(run_directory()), time.monotonic() + 30\n"
        "while run.status().status == 'interrupted' and time.monotonic() < deadline:\n"
        "    time.sleep(0.01)"
    )

"""The real notebook, through papermill's own command, with secrets that it tells and text that would run in a page."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell

from hydra.testing.hostile import pages, secrets
from hydra.testing.storm import ROOT, TIMEOUT_S

NAME = "<img src=x onerror=alert(1)>"
"""Of the notebook, and so of its run."""
RUN, FAILING = Path("runs", NAME), Path("runs", "failing")
REPORT, NOTEBOOK = RUN / "report.html", RUN / f"{NAME}.ipynb"
TOLD = (
    *(NOTEBOOK, REPORT, RUN / "trainer.log"),
    *(FAILING / "trainer.log", FAILING / "state.json"),
    *(Path("out.txt"), Path("err.txt")),
)
"""The control: without masking each of these files of a job would hold canaries."""
N_STEPS = 4
FAILS = """
options = {**read_parameters(), "attention_options": {"fails": True}}
watch(launch(TrainingConfig.from_parameters(options), "runs/failing"))
"""
RAISES = """
raise KeyError(f"{secrets[1]} {secrets[2]} {secrets[3]} {token}")
"""


def hostile_notebook() -> nbformat.NotebookNode:
    """notebooks/pretrain.ipynb with cells that tell secrets and show vectors, and which ends by a traceback."""
    nb = nbformat.read(ROOT / "notebooks" / "pretrain.ipynb", as_version=4)
    (place,) = [number for number, cell in enumerate(nb.cells) if "parameters" in cell.metadata.get("tags", [])]
    nb.cells[place].source += '\ntoken = ""  # secret'
    words = [new_markdown_cell(f"## {vector}\n\n{vector}\n") for vector in pages.VECTORS]
    nb.cells[place + 1 : place + 1] = [new_code_cell(secrets.LEAKS), new_code_cell(pages.SHOWS), *words]
    nb.cells += [new_code_cell(FAILS), new_code_cell(RAISES)]
    return nb


def run_job(root: Path, corpus: Path, environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run it in the workspace `root`; what it prints is left in printed.txt there.

    Args:
        environment: beside that of this process and the canaries.
    """
    shutil.copy(Path(__file__).with_name("leaky_attention.py"), root)
    nbformat.write(hostile_notebook(), root / f"{NAME}.ipynb")
    values = {"preset": "tiny", "corpus": str(corpus), "attention": "leaky_attention.py:Leaky", "max_steps": N_STEPS}
    texts = {"token": secrets.PARAMETER, "sample_prompt": " ".join(pages.VECTORS[:5])}
    command = [str(Path(sys.executable).with_name("papermill")), f"{NAME}.ipynb", str(NOTEBOOK), "--engine", "hydra"]
    command += _options("-p", {**values, "threads": 1}) + _options("-r", texts)
    command += ["--log-output", "--stdout-file", "out.txt", "--stderr-file", "err.txt"]
    done = subprocess.run(
        command,
        cwd=root,
        env={**os.environ, **secrets.ENVIRONMENT, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    (root / "printed.txt").write_text(done.stdout + done.stderr)
    return done


def artifacts(root: Path) -> list[Path]:
    """Every file that a job left in its workspace."""
    return [path for path in sorted(root.rglob("*")) if path.is_file()]


def _options(flag: str, values: Mapping[str, object]) -> list[str]:
    return [word for name, value in values.items() for word in (flag, name, str(value))]

"""The proof for GPUs on a machine without one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diagnostics.gpu_proof import __main__ as program
from diagnostics.gpu_proof.sections import SECTIONS

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "diagnostics.gpu_proof", str(tmp_path / "report.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs a CUDA GPU" in done.stderr
    assert not (tmp_path / "report.md").exists()


def test_a_section_that_fails_is_reported_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise RuntimeError("the card caught fire")

    def lack() -> str:
        raise ModuleNotFoundError(name="flash_attn")

    monkeypatch.setitem(SECTIONS, "broken", (fail, 1))
    monkeypatch.setitem(SECTIONS, "lacking", (lack, 1))
    monkeypatch.setitem(SECTIONS, "fine", (lambda: "| a |", 1))
    path = tmp_path / "section.md"
    assert program.write_section("broken", path) == 1
    assert "the card caught fire" in path.read_text()
    assert program.write_section("lacking", path) == 0
    assert path.read_text() == "Skipped: flash_attn is not installed."
    assert program.write_section("fine", path) == 0


def test_a_section_that_hangs_or_dies_is_ended_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECTIONS, "Machine", (SECTIONS["Machine"][0], 0.01))
    text, is_well = program.run_section("Machine")
    assert "more than 0.01 s" in text
    assert not is_well

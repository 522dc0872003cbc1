"""notebooks/pretrain.ipynb through papermill's own command and the engine `hydra`, as a user calls it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "pretrain.ipynb"
PAPERMILL = Path(sys.executable).parent / "papermill"
Call = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def papermill(tmp_path: Path) -> Call:
    def call(*arguments: str, output: str = "runs/pretrain/pretrain.ipynb") -> "subprocess.CompletedProcess[str]":
        command = [str(PAPERMILL), str(NOTEBOOK), output, "--engine", "hydra", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return call


REJECTED = {
    "unknown name": (["-p", "lerning_rate", "1"], ["lerning_rate", "did you mean learning_rate"]),
    "wrong type": (["-p", "max_steps", "many"], ["max_steps", "'many'"]),
    "bad value": (["-p", "learning_rate", "-1"], ["learning_rate", "greater than 0"]),
    "unknown option": (["-y", "{attention_options: {strid: 2}}"], ["strid"]),
    "missing corpus": (["-p", "corpus", "nowhere/at/all"], ["nowhere/at/all"]),
    "empty corpus": (["-p", "corpus", "empty"], ["empty"]),
    "papermill's traps": (
        ["-p", "tie_embeddings", "false", "-p", "tokenizer", "12e4567", "-p", "max_steps", "1e3"],
        ["-p tie_embeddings False", "-r tokenizer", "-p max_steps 1000"],
    ),
    "number for a folder": (["-p", "run_dir", "001"], ["run_dir", "-r run_dir"]),
    "tokenizer that is not there": (["-p", "tokenizer", "nowhere.json"], ["nowhere.json"]),
    "a tokenizer that is none": (["-p", "tokenizer", "file"], ["must be a tokenizer.json"]),
    "combination": (["-p", "micro_batch_size", "3"], ["micro_batch_size must divide batch_size"]),
    "unknown preset": (["-p", "preset", "debgu"], ["did you mean debug"]),
    "too small a corpus": (["-p", "corpus", "tiny.txt"], ["two different documents"]),
    "unknown kernel": (["-k", "nokernel"], ["nokernel"]),
    "a file for a folder": (["-r", "run_dir", "empty/../file"], ["file is a file"]),
    "a folder of something else": (["-r", "run_dir", "."], ["no run and holds"]),
    "code for a name": (["-p", "a=1; open('pwned', 'w'); b", "2"], ["plain Python name"]),
}


@pytest.mark.parametrize("case", REJECTED)
def test_what_cannot_be_run_is_rejected_at_once(papermill: Call, tmp_path: Path, case: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "tiny.txt").write_text("abc")
    arguments, told = REJECTED[case]
    began = time.monotonic()
    done = papermill(*arguments, output="out.ipynb")
    assert done.returncode == 2, done.stderr
    assert time.monotonic() - began < 5
    assert all(word in done.stderr for word in told), done.stderr
    assert "Traceback" not in done.stderr
    assert "Passed unknown parameter" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "tiny.txt"]


@pytest.mark.parametrize(
    ("output", "told"),
    [("runs/other/pretrain.ipynb", "-r run_dir runs/other"), (str(NOTEBOOK), "must not be the notebook itself")],
)
def test_an_output_that_would_mislead_or_destroy_is_rejected(
    papermill: Call, tmp_path: Path, corpus_dir: Path, output: str, told: str
) -> None:
    before = NOTEBOOK.read_bytes()
    done = papermill("-p", "preset", "tiny", "-p", "corpus", str(corpus_dir), output=output)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert NOTEBOOK.read_bytes() == before


def test_the_whole_job_and_its_second_call(papermill: Call, tmp_path: Path, corpus_dir: Path) -> None:
    arguments = ["-p", "preset", "tiny", "-p", "corpus", str(corpus_dir), "-p", "threads", "1", "-p", "max_steps", "12"]
    done = papermill(*arguments)
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "runs" / "pretrain"
    config = json.loads((run_dir / "config.json").read_text())
    assert (config["max_steps"], config["threads"], config["preset_name"]) == (12, 1, "tiny")
    value = f"{json.loads((run_dir / 'state.json').read_text())['val_bits_per_byte']:.3f} bits per byte"
    assert done.stdout.splitlines()[0].startswith(f"validation: {value}")
    assert done.stdout.splitlines()[1] == "report: runs/pretrain/report.html"
    notebook = nbformat.read(run_dir / "pretrain.ipynb", as_version=4)
    assert {cell.metadata.papermill.status for cell in notebook.cells} == {"completed"}

    page = (run_dir / "report.html").read_text()
    soup = BeautifulSoup(page, "html.parser")
    text = soup.get_text()
    assert len(page.encode()) < 2_000_000
    assert value in soup.find(class_="answer").get_text()
    titles = [heading.get_text() for heading in soup.find_all("h2")]
    for title in ("The plan", "Corpus", "Config", "Curves", "Memory", "Samples", "Yardsticks", "Environment"):
        assert titles.count(title) == 1, titles
    assert [link["href"] for link in soup.nav.find_all("a")] == [f"#{heading['id']}" for heading in soup.find_all("h2")]
    assert "--engine hydra -p preset tiny" in text
    assert config["corpus"][0] in text
    assert len(soup.find_all("img")) == 8

    kept = {name: (run_dir / name).read_bytes() for name in ("metrics.jsonl", "state.json", "config.json")}
    (run_dir / "report.html").unlink()
    again = papermill(*arguments)
    assert again.returncode == 0, again.stderr
    assert (run_dir / "report.html").exists()
    assert {name: (run_dir / name).read_bytes() for name in kept} == kept

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    refused = papermill(*arguments, "-p", "seed", "5")
    assert refused.returncode == 2
    assert "seed: 0 there, 5 asked for" in refused.stderr
    assert "runs/pretrain-2/pretrain.ipynb --engine hydra -p preset tiny" in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

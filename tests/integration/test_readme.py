"""What README shows can be done."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hydra.runtime import Run

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run_python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_lines_that_start_a_run(tmp_path: Path) -> None:
    program = BLOCKS[0].replace("max_steps=200", f'max_steps=2, data_dir="{tmp_path}/data"')
    said = run_python(program.replace("runs/from-python", f"{tmp_path}/from-python"))
    assert re.search(r"MiB predicted.*; about \d+ s, [\d.]+ MB of disk", said)
    assert "from-python is done at step 2 of 2" in said
    assert "<div" not in said


def test_the_lines_that_load_and_sample_a_model(
    make_run: Callable[..., Path], start_trainer: Callable[[Path], "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    run_dir = make_run("pretrain")
    assert start_trainer(run_dir).wait(timeout=120) == 0
    moved = tmp_path / "elsewhere"
    run_dir.rename(moved)
    assert len(BLOCKS) == 8
    assert len([line for line in BLOCKS[1].splitlines() if line]) == 5
    program = BLOCKS[1].replace("runs/pretrain", str(moved))
    said = [run_python(program) for _ in range(2)]
    assert len(said[0]) > 50
    assert said[0] == said[1]
    data_dir = json.loads((moved / "config.json").read_text())["data_dir"]
    more = "".join(BLOCKS[2:4]).replace("max_tokens=512", "max_tokens=64").replace("200", "20")
    said_more = run_python(program + more.replace('Path("data")', f"Path({data_dir!r})"))
    assert "\n---\n" in said_more
    assert re.search(r"[\d.]+ nats, [\d.]+ with 8 bits", said_more)


def test_the_lines_that_load_and_save_a_llama(tmp_path: Path) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="transformers, a development dependency, is not installed"
    )
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4)).eval()
    theirs.save_pretrained(tmp_path / "llama")
    run_python(BLOCKS[4].replace('"llama', f'"{tmp_path}/llama').replace('"saved', f'"{tmp_path}/saved'))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again) is type(theirs)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_an_attention_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "my_attention.py"
    path.write_text(BLOCKS[5])
    program = BLOCKS[6].replace("my_attention.py", str(path)).replace("runs/decaying", f"{tmp_path}/decaying")
    said = run_python(program.replace('corpus="README.md"', f'corpus="README.md", data_dir="{tmp_path}/data"'))
    assert "attention card: DecayingAverage" in said
    assert "everything holds" in said
    assert "decaying is done at step 20 of 20" in said
    assert (tmp_path / "decaying" / "code" / "my_attention.py").read_text() == BLOCKS[5]


def test_the_lines_that_look_at_a_step_again(
    make_run: Callable[..., Path], start_trainer: Callable[[Path], "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    run_dir = make_run("again")
    assert start_trainer(run_dir).wait(timeout=120) == 0
    program = BLOCKS[7].replace("run, 412", "run, 12").replace("run, 400", "run, 10")
    said = run_python(program.replace("runs/pretrain", str(run_dir)).replace("runs/lower", f"{tmp_path}/lower"))
    assert "bit for bit as recorded" in said
    parent = json.loads((tmp_path / "lower" / "parent.json").read_text())
    assert (parent["run"], parent["step"]) == ("again", 10)
    wait_until_done(tmp_path / "lower")


def wait_until_done(run_dir: Path) -> None:
    deadline = time.monotonic() + 60
    while Run.open(run_dir).status().status != "done":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_house_that_readme_describes_is_the_one_that_stands() -> None:
    tour = README.split("## The house")[1].split("```")[1]
    for folder in re.findall(r"^\s*([a-z]+)/", tour, flags=re.MULTILINE):
        assert any((ROOT / parent / folder).is_dir() for parent in ("", "hydra")), folder
    for folder in (path.name for path in (ROOT / "hydra").iterdir() if path.is_dir() and path.name != "__pycache__"):
        assert re.search(rf"^\s*{folder}/", tour, flags=re.MULTILINE), folder


def test_readme_is_finished_and_its_links_lead_somewhere() -> None:
    assert not re.findall(r"@[A-Z]+@", README)
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (ROOT / target).exists(), target

"""What README shows can be done."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_lines_that_load_and_sample_a_model(
    make_run: Callable[..., Path], start_trainer: Callable[[Path], "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    run_dir = make_run("pretrain")
    assert start_trainer(run_dir).wait(timeout=120) == 0
    moved = tmp_path / "elsewhere"
    run_dir.rename(moved)
    lines = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(lines) == 2
    assert len([line for line in lines[0].splitlines() if line]) == 5
    program = lines[0].replace("runs/pretrain", str(moved))
    command = [sys.executable, "-c", program]
    outputs = [subprocess.run(command, capture_output=True, text=True, cwd=ROOT) for _ in range(2)]
    assert outputs[0].returncode == 0, outputs[0].stderr
    assert len(outputs[0].stdout) > 50
    assert outputs[0].stdout == outputs[1].stdout
    both = program + lines[1].replace("max_tokens=512", "max_tokens=64").replace("200", "20")
    done = subprocess.run([sys.executable, "-c", both], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("[[")


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

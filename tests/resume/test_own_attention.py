"""Code of one's own travels with the run: it trains, goes on from the copy after a kill, and nothing else is run."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hydra.errors import ConfigError, RunError
from hydra.model.framework import build_model
from hydra.runtime import Run
from hydra.runtime.environment import record_checked_code
from scripts.comparison import ComparisonConfig
from scripts.config import TrainingConfig
from scripts.launch import write_config_once
from scripts.replay import fork, replay, verify

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "notebooks" / "examples" / "attention_classes"
CLASSES = {"sigmoid": "SigmoidAttention", "gated_recurrence": "GatedRecurrence", "convolution": "ConvolutionMixer"}
StartTrainer = Callable[[Path], "subprocess.Popen[str]"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A researcher's folder."""
    return Path(shutil.copytree(EXAMPLES, tmp_path / "own"))


def begin(own: Path, run_dir: Path, shared_data_dir: Path, corpus_dir: Path, **fields: object) -> TrainingConfig:
    attention = ", ".join(f"{own}/{file}.py:{name}" for file, name in CLASSES.items())
    fields = {"attention": attention, "n_layers": 3, "corpus": str(corpus_dir), "threads": 1, **fields}
    config = TrainingConfig.preset("tiny", data_dir=str(shared_data_dir), **fields)
    write_config_once(config, run_dir)
    return config


def test_three_classes_train_and_go_on_from_their_copies(
    own: Path,
    tmp_path: Path,
    shared_data_dir: Path,
    corpus_dir: Path,
    start_trainer: StartTrainer,
    weights_hash: Callable[[Path], str],
    figures: Callable[[Path], list[dict[str, object]]],
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    long = {"max_steps": 120, "compile_from_step": None, "attention_options": {"kernel_size": 3}, "eval_every": 60}
    for run_dir in (whole, killed):
        begin(own, run_dir, shared_data_dir, corpus_dir, **long)
    shutil.rmtree(own)  # from here on there are the copies
    assert start_trainer(whole).wait(timeout=300) == 0
    process = start_trainer(killed)
    deadline = time.monotonic() + 240
    while Run.open(killed).status().step < 10:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert Run.open(killed).status().status == "interrupted"
    assert start_trainer(killed).wait(timeout=300) == 0
    assert "going on from" in (killed / "trainer.log").read_text()
    assert weights_hash(killed) == weights_hash(whole)
    losses = [record["loss_nats"] for record in figures(whole) if "loss_nats" in record]
    assert losses[-1] < losses[0] - 0.5
    altered_and_sent(killed, tmp_path / "sent")


def altered_and_sent(run_dir: Path, sent: Path) -> None:
    """What a colleague may do with the run, and what not."""
    run_dir.rename(sent)
    run = Run.open(sent)
    program = (
        "from hydra.runtime import Run; from hydra.model.framework import build_model, generate\n"
        f"run = Run.open({str(sent)!r})\n"
        "try: run.load_model(build_model)\n"
        "except Exception as error: print(error)\n"
        "print(len(generate(run.load_model(build_model, trust_code=True), [1, 2, 3], 4)))"
    )
    # In a process of its own, in which nobody has named the files.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert "code must be trusted by name before it runs" in done.stdout, done.stderr
    assert "Run.load_model(build_model, trust_code=True)" in done.stdout
    assert done.stdout.splitlines()[-1] == "4", done.stderr
    for look in (lambda: replay(run, 3), lambda: fork(run, 3), lambda: verify(run)):
        with pytest.raises(RunError, match=r"is to run code that it holds.* trust_code=True"):
            look()
    again = replay(run, 3, trust_code=True)
    assert again.is_as_recorded, again.describe()
    copy = sent / "code" / "sigmoid.py"
    copy.write_text(copy.read_text() + "\n# changed\n")
    with pytest.raises(ConfigError, match=r"has SHA-256 [0-9a-f]{64} and the run's config says [0-9a-f]{64}"):
        run.load_model(build_model, trust_code=True)


def test_the_trainer_refuses_an_altered_copy(
    own: Path, tmp_path: Path, shared_data_dir: Path, corpus_dir: Path, start_trainer: StartTrainer
) -> None:
    run_dir = tmp_path / "altered"
    config = begin(own, run_dir, shared_data_dir, corpus_dir)
    copy = run_dir / "code" / "convolution.py"
    copy.write_text(copy.read_text() + "\nraise SystemExit('it ran')\n")
    process = start_trainer(run_dir)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert config.attention_code[f"{own}/convolution.py"]["sha256"] in errors
    assert "it ran" not in errors.splitlines()[-1]
    assert Run.open(run_dir).status().cause == "ConfigError"


def test_a_config_reads_its_own_code_back_without_the_file(
    own: Path, tmp_path: Path, shared_data_dir: Path, corpus_dir: Path
) -> None:
    config = begin(own, tmp_path / "run", shared_data_dir, corpus_dir)
    text = (tmp_path / "run" / "config.json").read_text()
    (own / "sigmoid.py").write_text((own / "sigmoid.py").read_text() + "\n# new\n")
    assert TrainingConfig.from_json(text) == config
    changed = TrainingConfig.preset(
        "tiny", **{name: value for name, (_, value) in config.differences().items() if name != "attention_code"}
    )
    with pytest.raises(RunError) as refused:
        write_config_once(changed, tmp_path / "run")
    assert (
        f"{own}/sigmoid.py has changed since the run began; its copy in {tmp_path}/run/code is what the run goes on "
        f"with: python -m scripts.trainer {tmp_path}/run\n"
    ) in str(refused.value)
    assert "sha256" not in str(refused.value)
    assert "convolution.py has changed" not in str(refused.value)
    assert f"give another run_dir, such as {tmp_path}/run-2" in str(refused.value)
    stored = {**json.loads(text), "attention_code": {}}
    with pytest.raises(ConfigError, match="must hold the SHA-256 and options"):
        TrainingConfig.from_json(json.dumps(stored))
    assert "attention_code" not in " ".join(config.papermill_arguments())


MINE = """import torch
from torch import nn

class Mine(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.proj = nn.Linear(spec.d_model, spec.d_model)

    def forward(self, x, places, ids):
        BODY
"""


def refuse(
    body: str, tmp_path: Path, shared_data_dir: Path, corpus_dir: Path, start_trainer: StartTrainer
) -> tuple[Path, str]:
    """Directory and last words of a run of a class with that forward, which fails."""
    path = tmp_path / "mine.py"
    path.write_text(MINE.replace("BODY", body))
    run_dir = tmp_path / "run"
    fields = {"data_dir": str(shared_data_dir), "corpus": str(corpus_dir), "threads": 1}
    write_config_once(TrainingConfig.preset("tiny", attention=f"gqa, {path}:Mine", **fields), run_dir)
    process = start_trainer(run_dir)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert Run.open(run_dir).status().step == 0
    return run_dir, str(Run.open(run_dir).status().message)


def test_a_class_that_sees_the_future_is_not_trained(
    tmp_path: Path, shared_data_dir: Path, corpus_dir: Path, start_trainer: StartTrainer
) -> None:
    run_dir, message = refuse("return self.proj(x.roll(-1, 1))", tmp_path, shared_data_dir, corpus_dir, start_trainer)
    assert "causality by perturbation: outputs at 0 change when tokens from 1 on do (smallest T = 2)" in message
    assert message.endswith(f"python -m hydra.testing {tmp_path}/mine.py:Mine")
    assert Run.open(run_dir).status().stage == "checking attention classes"
    assert "checked_code" not in json.loads((run_dir / "environment.json").read_text())
    assert not (run_dir / "data.json").exists()  # before anything that takes time


def test_what_fails_at_the_runs_own_length_is_named_with_its_line(
    tmp_path: Path, shared_data_dir: Path, corpus_dir: Path, start_trainer: StartTrainer
) -> None:
    body = "return self.proj(x) * [1][x.shape[1] // 32]"
    _, message = refuse(body, tmp_path, shared_data_dir, corpus_dir, start_trainer)
    assert "IndexError" in message
    assert f"at mine.py:10 `{body}` (look: python -m hydra.testing path.py:Class)" in message


def test_no_rate_is_blamed_for_the_first_step(
    tmp_path: Path, shared_data_dir: Path, corpus_dir: Path, start_trainer: StartTrainer
) -> None:
    body = "return self.proj(x) * (torch.nan if x.shape[1] == 32 else 1)"
    run_dir, message = refuse(body, tmp_path, shared_data_dir, corpus_dir, start_trainer)
    assert "in step 1 loss_nats is nan" in message
    assert "the weights have not moved. No learning rate has acted yet" in message
    assert "python -m hydra.testing path.py:Class" in message
    assert "Lower" not in message
    # What was checked once is not checked again, by hash; nor is it lost with the next session.
    environment = json.loads((run_dir / "environment.json").read_text())
    record = json.loads((run_dir / "config.json").read_text())["attention_code"][f"{tmp_path}/mine.py"]
    assert environment["checked_code"] == {f"{tmp_path}/mine.py": record["sha256"]}
    assert environment["resolved"]["threads"] == 1


def test_a_run_that_was_checked_is_not_checked_again(
    tmp_path: Path, shared_data_dir: Path, corpus_dir: Path, start_trainer: StartTrainer
) -> None:
    path, run_dir = tmp_path / "mine.py", tmp_path / "run"
    path.write_text(MINE.replace("BODY", "return self.proj(x.roll(-1, 1))"))
    fields = {"data_dir": str(shared_data_dir), "corpus": str(corpus_dir), "threads": 1, "max_steps": 2}
    config = TrainingConfig.preset("tiny", attention=f"{path}:Mine", **fields)
    write_config_once(config, run_dir)
    record_checked_code(run_dir, {str(path): config.attention_code[str(path)]["sha256"]})
    process = start_trainer(run_dir)
    assert process.wait(timeout=120) == 0, process.communicate()
    assert len(json.loads((run_dir / "environment.json").read_text())["checked_code"]) == 1


def test_no_arm_of_a_comparison_sees_the_future(tmp_path: Path, shared_data_dir: Path, corpus_dir: Path) -> None:
    path, run_dir = tmp_path / "mine.py", tmp_path / "comparison"
    path.write_text(MINE.replace("BODY", "return self.proj(x.roll(-1, 1))"))
    fields = {"preset": "tiny", "data_dir": str(shared_data_dir), "corpus": str(corpus_dir), "threads": 1}
    config = ComparisonConfig.from_parameters({"baseline": "gqa", "arms": [f"{path}:Mine"], **fields})
    write_config_once(config, run_dir)
    command = [sys.executable, "-m", "scripts.compare", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1, done.stderr
    assert f"of {path}:Mine, causality by perturbation" in Run.open(run_dir).status().message
    assert not (run_dir / "runs").exists()

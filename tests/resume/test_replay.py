"""Any step of a run once more, a new run from a step of another, and what a finished run is compared with."""

import dataclasses
import json
import shutil
import subprocess
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hydra.errors import ConfigError, DataError, RunError
from hydra.layers.feed_forward import SquaredReLU
from hydra.runtime import Run
from hydra.runtime.sums import find_altered_files, write_sums
from scripts.config import TrainingConfig
from scripts.replay import fork, replay, verify
from scripts.trainer import Trainer

MakeRun = Callable[..., Path]
StartTrainer = Callable[[Path], "subprocess.Popen[str]"]
FIELDS = {"max_steps": 60, "batch_size": 6, "micro_batch_size": 2, "checkpoint_every": 20, "eval_every": 25}


@pytest.fixture(scope="module")
def finished(make_run: MakeRun, start_trainer: StartTrainer) -> Path:
    run_dir = make_run("finished", **FIELDS)
    process = start_trainer(run_dir)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return run_dir


@pytest.mark.parametrize("step", [1, 41, 47, 60])
def test_a_step_once_more(finished: Path, step: int) -> None:
    """From the start, from the first step behind a checkpoint, from between, the last."""
    before = contents(finished)
    again = replay(Run.open(finished), step)
    assert again.is_as_recorded, again.describe()
    assert again.first_not_finite is None
    assert len(again.rows) == 6
    by_name = {record.name: record for record in again.modules}
    assert by_name["blocks.1.attention.q_proj"].output_rms > 0.0
    assert by_name["blocks.1.feed_forward"].gradient_rms > 0.0
    assert contents(finished) == before  # the run is as it was


def contents(run_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_a_step_that_is_not_there(finished: Path) -> None:
    for step in (0, 61, 3.5, "3"):
        with pytest.raises(RunError, match="whole number from 1 to 60"):
            replay(Run.open(finished), step)  # type: ignore[arg-type]
        if step != 0:
            with pytest.raises(RunError, match="whole number from 0 to 60"):
                fork(Run.open(finished), step)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="must be a run"):
        replay(str(finished), 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["output", "gradient"])
def test_what_is_not_finite_first_is_named(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The second feed-forward layer fails for the batch of step 50, in the run and whenever that is computed again."""
    run_dir = make_run("poisoned", **FIELDS)
    config = TrainingConfig.from_json((run_dir / "config.json").read_text())
    bad_inputs = torch.from_numpy(batch_of(config, run_dir, 50))
    was_forward = SquaredReLU.forward

    def forward(self: SquaredReLU, x_BTD: torch.Tensor) -> torch.Tensor:
        out_BTD = was_forward(self, x_BTD)
        if not (is_second(self) and torch.equal(seen["inputs"], bad_inputs[2:4])):
            return out_BTD
        if where == "output":
            return out_BTD.masked_fill(torch.ones_like(out_BTD, dtype=torch.bool), torch.nan)
        out_BTD.register_hook(lambda gradient: gradient * torch.inf)
        return out_BTD

    seen: dict[str, torch.Tensor] = {}
    layers: list[int] = []

    def is_second(layer: SquaredReLU) -> bool:
        if id(layer) not in layers:
            layers.append(id(layer))
        return layers.index(id(layer)) % 2 == 1

    was_forward_backward = Trainer._to_device

    def remember(self: Trainer, batch: object) -> tuple[torch.Tensor, ...]:
        tensors = was_forward_backward(self, batch)  # type: ignore[arg-type]
        seen["inputs"] = tensors[0]
        return tensors

    monkeypatch.setattr(SquaredReLU, "forward", forward)
    monkeypatch.setattr(Trainer, "_to_device", remember)
    Trainer(config, run_dir).train()
    run = Run.open(run_dir)
    assert run.status().status == "done"
    skipped = [json.loads(line) for line in (run_dir / "skipped_steps.jsonl").read_text().splitlines()]
    assert [record["step"] for record in skipped] == [50]

    began = time.monotonic()
    again = replay(run, 50)
    assert time.monotonic() - began < 30
    assert again.rows == skipped[0]["rows"]
    assert again.skipped == skipped[0]["reason"]
    whose = {"output": "its output", "gradient": "the gradient of its output"}[where]
    assert again.first_not_finite == f"blocks.1.feed_forward: {whose}", again.describe()


def batch_of(config: TrainingConfig, run_dir: Path, step: int) -> np.ndarray:
    trainer = Trainer(config, run_dir.with_name("looked-up"))
    with trainer.at_step(0):
        return trainer.dataset.train_batch(
            step - 1, seed=config.seed, n_rows=config.batch_size, n_tokens=config.context_length
        ).inputs_BT


@pytest.mark.parametrize("step", [0, 40, 47])
def test_an_unchanged_fork_equals_its_parent(
    finished: Path,
    step: int,
    weights_hash: Callable[[Path], str],
    figures: Callable[[Path], list[dict[str, object]]],
) -> None:
    run = fork(Run.open(finished), step, finished.with_name(f"fork-{step}"))
    assert wait(run).status == "done"
    assert weights_hash(run.directory) == weights_hash(finished)
    assert figures(run.directory) == figures(finished)
    parent = json.loads((run.directory / "parent.json").read_text())
    assert (parent["run"], parent["step"]) == ("finished", step)


def wait(run: Run) -> object:
    deadline = time.monotonic() + 120
    while run.status().status in ("queued", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return run.status()


def test_a_fork_with_changes(finished: Path) -> None:
    run = fork(Run.open(finished), 40, finished.with_name("changed"), learning_rate=1e-4, max_steps=70)
    assert wait(run).step == 70
    assert run.environment()["changes"] == [
        {
            "step": 40,
            "fields": {"learning_rate": [3e-3, 1e-4], "max_steps": [60, 70], "allow_changes": [[], unittest.mock.ANY]},
        }
    ]
    before, after = (
        [record for record in Run.open(directory).metrics() if record["step"] <= 40 and "val_loss_nats" not in record]
        for directory in (finished, run.directory)
    )
    assert before == after
    with pytest.raises(ConfigError, match="d_model"):
        fork(Run.open(finished), 40, finished.with_name("wider"), d_model=64)
    with pytest.raises(ConfigError, match="max_steps must be at least the 40 steps"):
        fork(Run.open(finished), 40, finished.with_name("shorter"), max_steps=30)
    with pytest.raises(ConfigError, match="must stay in the workspace"):
        fork(Run.open(finished), 40, "../outside")
    with pytest.raises(RunError, match="folder of its own"):
        fork(Run.open(finished), 40, finished.with_name("changed"))


@pytest.fixture(scope="module")
def changed_on_the_way(make_run: MakeRun, start_trainer: StartTrainer) -> Path:
    """40 steps, and 20 more with another learning rate; its newest checkpoint alone is kept."""
    run_dir = make_run("changed-on-the-way", **{**FIELDS, "max_steps": 40, "keep_checkpoints": 1, "keep_best": False})
    for changes in ({}, {"max_steps": 60, "learning_rate": 1e-3, "allow_changes": ["learning_rate", "max_steps"]}):
        config = json.loads((run_dir / "config.json").read_text())
        (run_dir / "config.json").write_text(json.dumps({**config, **changes}))
        _, errors = start_trainer(run_dir).communicate(timeout=120)
    assert Run.open(run_dir).status().step == 60, errors
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000060"]
    return run_dir


def test_what_a_run_changed_on_the_way_is_changed_there_again(changed_on_the_way: Path) -> None:
    run = Run.open(changed_on_the_way)
    for step in (7, 40, 41, 53):
        again = replay(run, step)
        assert again.is_as_recorded, again.describe()
    found = verify(run, 50)
    assert found.problems == []
    assert found.computed == [range(1, 41)]


def test_a_fork_of_before_a_change_is_as_the_run_was_then(
    changed_on_the_way: Path, weights_hash: Callable[[Path], str], figures: Callable[[Path], list[dict[str, object]]]
) -> None:
    parent = Run.open(changed_on_the_way)
    before = fork(parent, 30, changed_on_the_way.with_name("as-before"))
    assert wait(before).step == 40
    assert figures(before.directory) == [record for record in figures(parent.directory) if record["step"] <= 40]
    assert "changes" not in before.environment() or before.environment()["changes"] == []
    after = fork(parent, 40, changed_on_the_way.with_name("as-after"))
    assert wait(after).step == 60
    assert weights_hash(after.directory) == weights_hash(parent.directory)
    assert after.environment()["changes"] == parent.environment()["changes"]
    assert verify(after).problems == []


def test_what_changed_is_recorded_once_and_goes_when_taken_back(make_run: MakeRun) -> None:
    """Asked for, and stopped before the next checkpoint; the same again; then without one of the two."""
    run_dir = make_run("taken-back", **{**FIELDS, "max_steps": 20})
    config = TrainingConfig.from_json((run_dir / "config.json").read_text())
    Trainer(config, run_dir).train()
    longer = dataclasses.replace(config, max_steps=30, allow_changes=("learning_rate", "max_steps"))
    other_rate = dataclasses.replace(longer, learning_rate=1e-4)
    for asked, fields in (
        (other_rate, {"learning_rate", "max_steps", "allow_changes"}),
        (other_rate, {"learning_rate", "max_steps", "allow_changes"}),
        (longer, {"max_steps", "allow_changes"}),
    ):
        with Trainer(asked, run_dir).at_step(21):
            (change,) = Run.open(run_dir).environment()["changes"]
            assert change["step"] == 20
            assert set(change["fields"]) == fields
        state = json.loads((run_dir / "state.json").read_text())
        (run_dir / "state.json").write_text(json.dumps({**state, "status": "interrupted"}))


def test_a_fork_is_there_whole_or_not_at_all(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = finished.with_name("half")
    copytree = shutil.copytree

    def half(source: Path, to: Path, **options: object) -> object:
        if not (source / "parent.json").exists():
            return copytree(source, to, **options)  # type: ignore[call-overload]
        to.mkdir()
        shutil.copy(source / "config.json", to)
        there.append(target.exists())
        raise OSError(5, "the disk went away")

    there: list[bool] = []
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copytree", half)
        with pytest.raises(OSError, match="the disk went away"):
            fork(Run.open(finished), 40, target)
    assert there == [False]
    assert not target.exists()
    assert list(finished.parent.glob(".fork-*")) == []


def test_a_moved_run_is_verified_and_any_altered_byte_is_named(finished: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(finished, tmp_path / "moved"))
    found = verify(Run.open(moved), 20)
    assert found.problems == []
    assert found.computed == [range(1, 21), range(51, 61)]  # the checkpoints of 50 and 60 are kept
    names = [path.relative_to(moved) for path in sorted(moved.rglob("*")) if path.is_file() and path.name != "lock"]
    assert {"config.json", "metrics.jsonl", "trainer.log", "SHA256SUMS"} <= {str(name) for name in names}
    for name in names:
        content = bytearray((moved / name).read_bytes() or b" ")
        content[len(content) // 2] ^= 1
        (moved / name).write_bytes(content)
        assert any(str(name) in problem for problem in find_altered_files(moved)), name
        (moved / name).write_bytes((finished / name).read_bytes())


def test_what_was_altered_is_told_also_where_no_step_can_be_computed(finished: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(finished, tmp_path / "moved"))
    manifest = json.loads((moved / "data.json").read_text())
    (moved / "data.json").write_text(json.dumps({**manifest, "fingerprint": "0" * 16}))
    found = verify(Run.open(moved), 20)
    assert found.computed == []
    assert len(found.problems) == 2
    assert "data.json: has changed since it was written" in found.problems[0]
    assert found.describe() == "2 problems; computed again: no step"
    write_sums(moved)
    with pytest.raises(DataError):
        verify(Run.open(moved), 20)
    with pytest.raises(RunError, match="a whole number of at least 1, but got 0"):
        verify(Run.open(finished), 0)


def test_a_run_that_was_tampered_with_as_a_whole_is_found_by_computing(finished: Path, tmp_path: Path) -> None:
    """A figure is made better and taken down anew: only computing it again tells."""
    better = Path(shutil.copytree(finished, tmp_path / "better"))
    lines = (better / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[10])
    lines[10] = json.dumps({**record, "loss_nats": record["loss_nats"] - 0.1})
    (better / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_sums(better)
    problems = verify(Run.open(better), 20).problems
    assert len(problems) == 1
    assert f"step {record['step']}" in problems[0]

"""The same command goes on, or says why not: with other configs, cleared data, finished and failed runs."""

import json
import random
import shutil
import subprocess
import time
import unittest.mock
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hydra.errors import DataError, RunError
from hydra.runtime import Run
from hydra.runtime.sums import find_altered_files
from hydra.testing import storm
from scripts.config import TrainingConfig
from scripts.replay import verify
from scripts.trainer import Trainer

ROOT = Path(__file__).parents[2]
MakeRun = Callable[..., Path]
StartTrainer = Callable[[Path], "subprocess.Popen[str]"]


def finish(start_trainer: StartTrainer, run_dir: Path) -> None:
    process = start_trainer(run_dir)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def uninterrupted(make_run: MakeRun, start_trainer: StartTrainer) -> Path:
    run_dir = make_run("uninterrupted", **storm.LONG)
    finish(start_trainer, run_dir)
    return run_dir


def test_8_bit_state_goes_on_from_a_checkpoint(
    make_run: MakeRun, start_trainer: StartTrainer, weights_hash: Callable[[Path], str]
) -> None:
    """Wide enough that the tables' state is in 8 bits; the optimizer is compiled from the first step, blocks later."""
    wide = {"d_model": 256, "n_layers": 1, "adam_state": "8bit", "compile_from_step": 6, "checkpoint_every": 4}
    whole = make_run("whole", **wide, max_steps=8, eval_every=8)
    finish(start_trainer, whole)
    cut = Path(shutil.copytree(whole, whole.with_name("cut")))
    optimizer = load_file(cut / "checkpoints" / "step-00000004" / "optimizer.safetensors")
    assert optimizer["embedding.weight/exp_avg/codes"].dtype == torch.uint8
    shutil.rmtree(cut / "checkpoints" / "step-00000008")
    state = json.loads((cut / "state.json").read_text())
    (cut / "state.json").write_text(json.dumps({**state, "status": "interrupted"}))
    finish(start_trainer, cut)
    assert "going on from" in (cut / "trainer.log").read_text()
    assert weights_hash(cut) == weights_hash(whole)


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while Run.open(run_dir).status().step < step:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_stopped_while_it_prepares_it_ends_at_once_and_says_so(
    make_run: MakeRun, start_trainer: StartTrainer, tmp_path: Path
) -> None:
    """Training a tokenizer is one long library call; the signal must not wait for its end."""
    corpus = tmp_path / "large"
    corpus.mkdir()
    source = random.Random(1)
    for number in range(40):
        words = (
            "".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randrange(3, 12))) for _ in range(40_000)
        )
        (corpus / f"{number}.txt").write_text(" ".join(words))
    run_dir = make_run(
        "preparing", corpus=str(corpus), data_dir=str(tmp_path / "data"), tokenizer="bpe", vocab_size=30_000
    )
    process = start_trainer(run_dir)
    deadline = time.monotonic() + 60
    while Run.open(run_dir).status().stage != "preparing data":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1.0)
    assert Run.open(run_dir).status().stage == "preparing data", "the corpus is too small for this test"
    process.terminate()
    assert process.wait(timeout=5) == 75
    status = Run.open(run_dir).status()
    assert (status.status, status.cause, status.step) == ("interrupted", "SIGTERM", 0)


def test_stopped_while_torch_is_imported_it_says_so(
    make_run: MakeRun,
    start_trainer: StartTrainer,
    stopped_while_torch_is_imported: Callable[["Callable[[], subprocess.Popen[str]]"], str],
) -> None:
    run_dir = make_run("importing")
    stopped_while_torch_is_imported(lambda: start_trainer(run_dir))
    status = Run.open(run_dir).status()
    assert (status.status, status.cause, status.step) == ("interrupted", "SIGTERM", 0)


def state_of(run_dir: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run_dir.rglob("*")}


def test_a_finished_run_is_not_touched_again(make_run: MakeRun, start_trainer: StartTrainer) -> None:
    run_dir = make_run("done")
    finish(start_trainer, run_dir)
    before = state_of(run_dir)
    finish(start_trainer, run_dir)
    assert state_of(run_dir) == before


@pytest.mark.parametrize(("field", "value"), [("learning_rate", 0.5), ("max_steps", 30)])
def test_a_config_edited_after_the_first_checkpoint_is_refused(
    make_run: MakeRun, start_trainer: StartTrainer, field: str, value: float
) -> None:
    run_dir = make_run("edited")
    finish(start_trainer, run_dir)
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps({**config, field: value}))
    before = state_of(run_dir)
    _, errors = (process := start_trainer(run_dir)).communicate(timeout=60)
    assert process.returncode == 1
    assert f"{field}: {config[field]!r} there, {value!r} asked for" in errors
    assert state_of(run_dir) == before


def test_shards_that_were_cleared_away_are_made_again(
    make_run: MakeRun,
    start_trainer: StartTrainer,
    uninterrupted: Path,
    tmp_path: Path,
    weights_hash: Callable[[Path], str],
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(ROOT / "tests" / "assets" / "notes", corpus)
    run_dir = make_run("cleared", **storm.LONG, data_dir=str(tmp_path / "data"), corpus=str(corpus))
    process = start_trainer(run_dir)
    wait_for_step(run_dir, 8)
    process.terminate()
    assert process.wait(timeout=20) == 75
    shutil.rmtree(tmp_path / "data")
    (corpus / "00.txt").write_text("another text")
    assert start_trainer(run_dir).wait(timeout=60) == 1
    assert "SHA-256" in (Run.open(run_dir).status().message or "")
    shutil.copy(ROOT / "tests" / "assets" / "notes" / "00.txt", corpus)
    finish(start_trainer, run_dir)
    assert weights_hash(run_dir) == weights_hash(uninterrupted)


def test_a_run_whose_manifest_is_removed_goes_on_with_its_own_text_only(make_run: MakeRun, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(ROOT / "tests" / "assets" / "notes", corpus)
    run_dir = make_run("unnamed", max_steps=2, checkpoint_every=1, data_dir=str(tmp_path / "data"), corpus=str(corpus))
    trainer = Trainer(TrainingConfig.from_json((run_dir / "config.json").read_text()), run_dir)
    trainer.train()
    manifest, tokenizer = ((run_dir / name).read_bytes() for name in ("data.json", "tokenizer.json"))
    (run_dir / "data.json").unlink()
    (run_dir / "state.json").unlink()
    text = (corpus / "00.txt").read_bytes()
    (corpus / "00.txt").write_text("another text")
    with pytest.raises(DataError, match=r"data.json is missing .* bring back that text, or copy (.*)/manifest.json to"):
        trainer.train()
    assert not (run_dir / "data.json").exists()
    assert (run_dir / "tokenizer.json").read_bytes() == tokenizer

    other = {**json.loads(manifest), "fingerprint": "0" * 64}
    (run_dir / "data.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match=r"data.json must name the data that the run has trained on"):
        trainer.train()

    # What the two refusals advise.
    shutil.copy(tmp_path / "data" / json.loads(manifest)["fingerprint"] / "manifest.json", run_dir / "data.json")
    assert trainer.train().status == "done"
    (run_dir / "data.json").unlink()
    (run_dir / "state.json").unlink()
    (corpus / "00.txt").write_bytes(text)
    assert trainer.train().status == "done"
    assert (run_dir / "data.json").read_bytes() == manifest


def test_a_change_is_taken_down_once_and_only_if_steps_are_taken_with_it(make_run: MakeRun) -> None:
    run_dir = make_run("noted", max_steps=4, checkpoint_every=2)
    config = TrainingConfig.from_json((run_dir / "config.json").read_text())
    Trainer(config, run_dir).train()
    Trainer(replace(config, wandb_project="other"), run_dir).train()
    assert "changes" not in Run.open(run_dir).environment()
    assert verify(Run.open(run_dir)).problems == []

    longer = replace(config, wandb_project="other", max_steps=6, allow_changes=("max_steps",))
    with pytest.raises(RunError, match="max_steps: 4 there, 6 asked for"):
        Trainer(replace(longer, allow_changes=()), run_dir).train()
    for _ in range(2):
        trainer = Trainer(longer, run_dir)
        trainer.train_step = unittest.mock.Mock(side_effect=KeyboardInterrupt)  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    Trainer(longer, run_dir).train()
    fields = {"max_steps": [4, 6], "allow_changes": [[], ["max_steps"]], "wandb_project": ["hydra", "other"]}
    assert Run.open(run_dir).environment()["changes"] == [{"step": 4, "fields": fields}]
    assert find_altered_files(run_dir) == []


def test_changed_config_is_refused(make_run: MakeRun, start_trainer: StartTrainer) -> None:
    run_dir = make_run("changed")
    finish(start_trainer, run_dir)
    files = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    config = TrainingConfig.from_json((run_dir / "config.json").read_text())
    changed = TrainingConfig.from_parameters({**_parameters(config), "learning_rate": 1.0})
    with pytest.raises(RunError, match=r"learning_rate: 0.003 there, 1.0 asked for"):
        Trainer(changed, run_dir).train()
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == files


def _parameters(config: TrainingConfig) -> dict[str, object]:
    stored = json.loads(config.to_json())
    return {"preset": stored.pop("preset_name"), **stored}


def test_micro_batches_change_rounding_and_nothing_else(
    make_run: MakeRun, start_trainer: StartTrainer, figures: Callable[[Path], list[dict[str, object]]]
) -> None:
    losses = {}
    for micro_batch_size in (1, 2, 4):
        run_dir = make_run(f"micro-{micro_batch_size}", micro_batch_size=micro_batch_size)
        finish(start_trainer, run_dir)
        losses[micro_batch_size] = [record["loss_nats"] for record in figures(run_dir) if "loss_nats" in record]
    for micro_batch_size in (1, 2):
        assert losses[micro_batch_size] == pytest.approx(losses[4], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(
    make_run: MakeRun, start_trainer: StartTrainer
) -> None:
    run_dir = make_run("explodes", learning_rate=1e30, max_gradient_norm=1e30, max_steps=20, checkpoint_every=1)
    process = start_trainer(run_dir)
    assert process.wait(timeout=60) == 1
    run = Run.open(run_dir)
    status = run.status()
    assert (status.status, status.cause) == ("failed", "not finite")
    with pytest.raises(RunError, match="finite"):
        run.raise_for_status()
    for record in run.metrics():
        assert all(value == value and abs(value) != float("inf") for value in record.values())


@pytest.mark.parametrize("content", [None, "{}", '{"seed": 1', '{"surplus": 1}', "null", "\\xff"])
def test_a_bad_config_file_exits_2(tmp_path: Path, start_trainer: StartTrainer, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="latin-1")
    process = start_trainer(tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "config.json" in errors
    assert "Traceback" not in errors


def test_a_file_in_place_of_a_run_directory_exits_2(tmp_path: Path, start_trainer: StartTrainer) -> None:
    (tmp_path / "config.json").write_text("{}")
    _, errors = (process := start_trainer(tmp_path / "config.json")).communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in errors

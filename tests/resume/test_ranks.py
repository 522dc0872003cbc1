"""One or two processes under torchrun, any micro-batch: the same samples, the same losses within rounding."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hydra.runtime import Run
from hydra.testing import storm
from hydra.testing.storm import Faults

ROOT = Path(__file__).parents[2]
MakeRun = Callable[..., Path]
Figures = Callable[[Path], list[dict[str, object]]]
FIELDS = {"max_steps": 40, "batch_size": 4, "checkpoint_every": 10, "eval_every": 20, "log_every": 1}


def start(run_dir: Path, n_ranks: int, faults: Faults = ()) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)]
    command += ["-m", *storm.arguments(run_dir, faults)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def finish(run_dir: Path, n_ranks: int, faults: Faults = ()) -> None:
    process = start(run_dir, n_ranks, faults)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors


def losses(records: list[dict[str, object]]) -> list[object]:
    return [record["loss_nats"] for record in records if "loss_nats" in record]


@pytest.fixture(scope="module")
def alone(make_run: MakeRun) -> Path:
    run_dir = make_run("alone", **FIELDS)
    finish(run_dir, 1)
    return run_dir


def test_two_ranks_compute_what_one_does(
    make_run: MakeRun, alone: Path, figures: Figures, weights_hash: Callable[[Path], str]
) -> None:
    run_dir = make_run("together", **FIELDS, micro_batch_size=1)
    finish(run_dir, 2)
    run = Run.open(run_dir)
    assert run.status().status == "done"
    assert losses(figures(run_dir)) == pytest.approx(losses(figures(alone)), rel=1e-5)
    assert run.status().val_loss_nats == pytest.approx(Run.open(alone).status().val_loss_nats, rel=1e-5)
    finish(run_dir, 2)  # done already: nothing is left to do, and no process waits for another

    again = make_run("again", **FIELDS, micro_batch_size=1)
    process = start(again, 2)
    wait_for_step(again, 13)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finish(again, 2)
    assert weights_hash(again) == weights_hash(run_dir)
    assert figures(again) == figures(run_dir)


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while Run.open(run_dir).status().step < step:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("before", "after"), [((1, 4), (2, 2)), ((2, 1), (1, 2))])
def test_ranks_and_micro_batch_may_change_on_the_way(
    make_run: MakeRun, alone: Path, figures: Figures, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """(ranks, micro-batch) before and after SIGTERM; what has changed is recorded."""
    run_dir = make_run("changing", **FIELDS, micro_batch_size=before[1])
    process = start(run_dir, before[0])
    wait_for_step(run_dir, 3)
    trainer = Run.open(run_dir).status().pid
    assert trainer is not None
    os.kill(trainer, signal.SIGTERM)
    process.communicate(timeout=60)
    status = Run.open(run_dir).status()
    assert (status.status, status.cause) == ("interrupted", "SIGTERM")
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps({**config, "micro_batch_size": after[1]}))
    finish(run_dir, after[0])
    run = Run.open(run_dir)
    assert losses(figures(run_dir)) == pytest.approx(losses(figures(alone)), rel=1e-5)
    fields = {"micro_batch_size": [before[1], after[1]], "n_ranks": [before[0], after[0]]}
    assert run.environment()["changes"] == [{"step": status.step, "fields": fields}]


def test_memory_refused_to_one_rank_halves_the_micro_batch_of_all(
    make_run: MakeRun, alone: Path, figures: Figures
) -> None:
    run_dir = make_run("refused", **FIELDS, micro_batch_size=2)
    finish(run_dir, 2, [{"fault": "no_memory", "step": 13, "place": "forward", "rank": 1}])
    assert losses(figures(run_dir)) == pytest.approx(losses(figures(alone)), rel=1e-5)
    resolved = Run.open(run_dir).environment()["resolved"]
    assert resolved["micro_batch_size"] == 1  # type: ignore[index]


def test_a_batch_that_cannot_be_shared_is_refused(make_run: MakeRun) -> None:
    run_dir = make_run("odd", **{**FIELDS, "batch_size": 3, "micro_batch_size": 1})
    process = start(run_dir, 2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "batch_size must be a multiple of the number of processes" in errors
    assert "batch_size" in (Run.open(run_dir).status().message or "")


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-3},
        {"context_length": 16},
        {"seed": 5},
        {"vocab_size": 300},
        {"d_model": 64},
        {"corpus": ["README.md"]},
        {"optimizer": "adamw"},
        {"max_steps": 50},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_other_change_is_refused_by_name(
    alone: Path, start_trainer: Callable[[Path], "subprocess.Popen[str]"], change: dict[str, object]
) -> None:
    config = json.loads((alone / "config.json").read_text())
    if config[next(iter(change))] == next(iter(change.values())):
        change = {"optimizer": "muon"}
    (alone / "config.json").write_text(json.dumps({**config, **change}))
    process = start_trainer(alone)
    _, errors = process.communicate(timeout=60)
    (alone / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    assert process.returncode == 1
    assert f"{next(iter(change))}:" in errors
    assert "started with another" in errors


def test_a_change_that_is_allowed_by_name(
    make_run: MakeRun, start_trainer: Callable[[Path], "subprocess.Popen[str]"]
) -> None:
    run_dir = make_run("longer", max_steps=10)
    assert start_trainer(run_dir).wait(timeout=60) == 0
    config = json.loads((run_dir / "config.json").read_text())
    longer = {**config, "max_steps": 14, "learning_rate": 1e-4, "allow_changes": ["max_steps", "learning_rate"]}
    (run_dir / "config.json").write_text(json.dumps(longer))
    assert start_trainer(run_dir).wait(timeout=60) == 0
    assert Run.open(run_dir).status().step == 14
    changes = Run.open(run_dir).environment()["changes"]
    assert changes[0]["step"] == 10
    assert changes[0]["fields"]["learning_rate"] == [config["learning_rate"], 1e-4]

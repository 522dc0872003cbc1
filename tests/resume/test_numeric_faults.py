"""Numbers that are not finite, losses that jump, memory that is refused, clocks that are set: what a run does then."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hydra.data import open_dataset
from hydra.runtime import Run, paths
from hydra.runtime.checkpoint import checkpoint_directory, list_checkpoints, newest_whole, step_of
from hydra.runtime.records import read_records
from hydra.testing import storm

MakeRun = Callable[..., Path]
NAN, INF = math.nan, math.inf
RUN: dict[str, Any] = {
    "max_steps": 56,
    "batch_size": 8,
    "micro_batch_size": 8,
    "checkpoint_every": 7,
    "eval_every": 20,
    "keep_checkpoints": 100,
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def undisturbed(make_run: MakeRun) -> Path:
    run_dir = make_run("undisturbed", **RUN)
    storm.finish(run_dir)
    return run_dir


def begin_anew(run_dir: Path, name: str) -> Path:
    """A run of the same config that has its data and its choices, and no step."""
    anew = run_dir.with_name(name)
    anew.mkdir()
    for file in (paths.CONFIG, paths.ENVIRONMENT, paths.MEMORY_PLAN, paths.MANIFEST, paths.TOKENIZER):
        shutil.copy(run_dir / file, anew / file)
    return anew


def losses(run_dir: Path) -> dict[int, float]:
    return {record["step"]: record["loss_nats"] for record in storm.figures(run_dir) if "loss_nats" in record}


def test_no_step_is_taken_from_what_is_not_finite(make_run: MakeRun) -> None:
    run_dir = make_run("not_finite", **{**RUN, "checkpoint_every": 1, "micro_batch_size": 4, "max_steps": 20})
    faults: dict[int, dict[str, Any]] = {
        4: {"fault": "bad_loss", "added": NAN},
        6: {"fault": "bad_loss", "added": INF},
        8: {"fault": "bad_loss", "factor": NAN, "micro_batch": 1},
        10: {"fault": "bad_loss", "factor": INF, "micro_batch": 0},
        12: {"fault": "bad_gradient", "value": NAN},
        14: {"fault": "bad_gradient", "value": -INF},
    }
    errors = storm.finish(run_dir, [{**fault, "step": step} for step, fault in faults.items()])
    run = Run.open(run_dir)
    dataset = open_dataset(run.manifest(), Path(str(run.config()["data_dir"])))
    skipped = read_records(run_dir / paths.SKIPPED)
    assert [record["step"] for record in skipped] == list(faults)
    for record in skipped:
        rows = dataset.train_rows(record["step"] - 1, seed=run.config()["seed"], n_rows=8, n_tokens=32)  # type: ignore[arg-type]
        assert record["rows"] == rows
        assert f"step {record['step']} is skipped" in errors
    assert sorted(losses(run_dir)) == [step for step in range(1, 21) if step not in faults]
    assert storm.non_finite_tensors(run_dir) == []
    for step in range(2, 21):
        for group in ("model", "optimizer"):
            before, after = (
                load_file(checkpoint_directory(run_dir, number) / f"{group}.safetensors") for number in (step - 1, step)
            )
            moved = any(not torch.equal(before[name], after[name]) for name in before)
            assert moved is (step not in faults), (step, group)


def test_losses_that_jump_are_skipped_alike_with_and_without_a_kill(undisturbed: Path) -> None:
    """Killed right after the step, and once more when the checkpoint after it is there: its window must be too."""
    jumps = [{"fault": "bad_loss", "step": step, "factor": 50.0} for step in (41, 45)]
    whole = begin_anew(undisturbed, "jumps")
    storm.finish(whole, jumps)
    assert [record["step"] for record in read_records(whole / paths.SKIPPED)] == [41, 45]
    killed = begin_anew(undisturbed, "jumps_killed")
    for step in (42, 44):
        storm.finish(killed, [*jumps, {"fault": "kill", "step": step}], -9)
    assert storm.newest_step(killed) == 42
    storm.finish(killed, jumps)
    assert storm.differences(killed, whole) == []
    assert storm.non_finite_tensors(killed) == []


def test_weights_damaged_in_memory_are_rolled_back(undisturbed: Path) -> None:
    """One that every step reads; one that is read by no step before the next checkpoint; one while it is evaluated."""
    run_dir = begin_anew(undisturbed, "damaged_weights")
    unused = {"name": "embedding.weight", "index": 255 * 32}  # no text holds that byte
    faults = [
        {"fault": "bad_weight", "step": 10, "value": NAN},
        {"fault": "bad_weight", "step": 17, "value": INF, **unused},
        {"fault": "bad_weight", "step": 40, "value": NAN, "in_evaluation": True},
    ]
    errors = storm.finish(run_dir, faults)
    assert errors.count("going back to the newest checkpoint") == 3
    assert storm.differences(run_dir, undisturbed) == []
    assert storm.non_finite_tensors(run_dir) == []


def test_a_damaged_copy_of_a_weight_is_made_again(make_run: MakeRun) -> None:
    """In bfloat16 the model computes with copies of the float32 weights."""
    fast = {**RUN, "dtype": "bfloat16", "optimizer": "muon", "max_steps": 21}
    whole = make_run("copies", **fast)
    storm.finish(whole)
    run_dir = begin_anew(whole, "damaged_copy")
    errors = storm.finish(run_dir, [{"fault": "bad_weight", "step": 10, "value": NAN}])
    assert errors.count("going back to the newest checkpoint") == 1
    assert storm.differences(run_dir, whole) == []


def test_going_back_is_bounded(undisturbed: Path) -> None:
    run_dir = begin_anew(undisturbed, "damaged_again")
    errors = storm.finish(run_dir, [{"fault": "bad_weight", "step": 10, "value": NAN, "times": 100}], 1)
    assert errors.count("going back to the newest checkpoint") == 3
    status = Run.open(run_dir).status()
    assert (status.status, status.cause) == ("failed", "not finite")
    assert storm.newest_step(run_dir) == 7
    storm.finish(run_dir)
    assert storm.differences(run_dir, undisturbed) == []


def test_memory_that_is_refused_changes_rounding_and_nothing_else(undisturbed: Path) -> None:
    """To the first optimizer step, to a forward pass and to an evaluation, by three allocators."""
    run_dir = begin_anew(undisturbed, "refused")
    refusals = [
        {"fault": "no_memory", "step": 1, "place": "optimizer", "kind": "Python"},
        {"fault": "no_memory", "step": 5, "place": "forward", "kind": "GPU", "micro_batch": 1},
        {"fault": "no_memory", "step": 20, "place": "evaluation", "kind": "CPU"},
    ]
    errors = storm.finish(run_dir, [*refusals, {"fault": "kill", "step": 24}], -9)
    for before, after in ((8, 4), (4, 2), (2, 1)):
        assert f"micro_batch_size {before} becomes {after}" in errors
    assert Run.open(run_dir).environment()["resolved"]["micro_batch_size"] == 1  # type: ignore[index]
    assert "micro_batch_size=1" in storm.finish(run_dir)
    mine, theirs = storm.figures(run_dir), storm.figures(undisturbed)
    assert [(record["step"], record["tokens"]) for record in mine] == [
        (record["step"], record["tokens"]) for record in theirs
    ]
    assert losses(run_dir) == pytest.approx(losses(undisturbed), rel=1e-5)
    for one, other in zip(mine, theirs, strict=True):
        if "val_loss_nats" in one:
            assert one["val_loss_nats"] == pytest.approx(other["val_loss_nats"], rel=1e-5)


def test_memory_that_is_refused_to_one_row_ends_the_run(undisturbed: Path) -> None:
    run_dir = begin_anew(undisturbed, "refused_for_good")
    errors = storm.finish(run_dir, [{"fault": "no_memory", "step": 9, "place": "forward", "times": 100}], 1)
    assert "must fit the memory, but it was refused for one row at a time" in errors
    assert "Traceback" not in errors
    assert Run.open(run_dir).status().cause == "out of memory"
    assert storm.newest_step(run_dir) == 7


def test_generators_go_on_where_they_were(undisturbed: Path) -> None:
    noise = {"fault": "noise"}
    whole, killed = begin_anew(undisturbed, "noise"), begin_anew(undisturbed, "noise_killed")
    storm.finish(whole, [noise])
    storm.finish(killed, [noise, {"fault": "kill", "step": 25}], -9)
    assert storm.newest_step(killed) == 21
    storm.finish(killed, [noise])
    assert storm.differences(killed, whole) == []


def test_a_clock_that_is_set_changes_nothing(undisturbed: Path) -> None:
    run_dir = begin_anew(undisturbed, "clock")
    an_hour_back, a_year_on = (
        {"fault": "clock_jump", "step": step, "seconds": seconds} for step, seconds in ((10, -3600.0), (30, 3.2e7))
    )
    storm.finish(run_dir, [an_hour_back, a_year_on, {"fault": "kill", "step": 33}], -9)
    storm.finish(run_dir, [an_hour_back])
    assert storm.differences(run_dir, undisturbed) == []
    assert list(map(step_of, list_checkpoints(run_dir))) == list(map(step_of, list_checkpoints(undisturbed)))
    for age, directory in enumerate(list_checkpoints(run_dir)):
        storm.set_age(directory, 3600.0 * age)
    assert newest_whole(run_dir) == checkpoint_directory(run_dir, RUN["max_steps"])
    assert all(record["elapsed_s"] < 600 for record in Run.open(run_dir).metrics())

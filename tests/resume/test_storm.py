"""Killed at any moment, again and again, the same command ends at the same weights; nobody does anything by hand."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from hydra.runtime import Run
from hydra.testing import storm

MakeRun = Callable[..., Path]
N_KILLS = 12
# Several epochs of the small corpus, accumulation, and a checkpoint that shares no factor with evaluations.
LONG = {
    "max_steps": 400,
    "batch_size": 6,
    "micro_batch_size": 2,
    "checkpoint_every": 7,
    "eval_every": 50,
    "log_every": 1,
}
# Compiled code takes over in the middle of the run; kills come before and after.
FAST = {**LONG, "optimizer": "muon", "dtype": "bfloat16", "compile_from_step": 30}
PATHS = {
    "plain": LONG,
    "blocked": {**FAST, "attention_kernel": "blocked"},
    "tiled": {**FAST, "attention_kernel": "tiled"},
}


@pytest.fixture(scope="module")
def undisturbed(make_run: MakeRun) -> Path:
    run_dir = make_run("undisturbed", **LONG)
    storm.finish(run_dir)
    return run_dir


@pytest.mark.parametrize(("path", "n_kills"), [("plain", N_KILLS), ("blocked", N_KILLS), ("tiled", 3)])
def test_killed_again_and_again(
    path: str, n_kills: int, make_run: MakeRun, request: pytest.FixtureRequest, moments: random.Random
) -> None:
    if path == "plain":
        undisturbed = request.getfixturevalue("undisturbed")
    else:
        undisturbed = make_run("undisturbed", **PATHS[path])
        storm.finish(undisturbed)
    assert Run.open(undisturbed).status().tokens > epoch_tokens(undisturbed), "the run must go beyond an epoch's end"
    kills: list[int] = []
    most_in_an_epoch = 0
    while len(kills) < n_kills:
        run_dir = make_run("killed", **PATHS[path])
        killed_at = storm.kill_until_done(run_dir, n_kills - len(kills), moments)
        assert killed_at, "the run is too short for this test"
        assert storm.differences(run_dir, undisturbed) == []
        assert [record["step"] for record in storm.figures(run_dir) if "loss_nats" in record] == list(range(1, 401))
        status = Run.open(run_dir).status()
        assert (status.step, status.restarts, status.cause) == (400, len(killed_at), None)
        kills += killed_at
        epochs = Counter(step * 6 * 32 // epoch_tokens(run_dir) for step in killed_at)
        most_in_an_epoch = max(most_in_an_epoch, *epochs.values())
    assert most_in_an_epoch >= 3 or n_kills < N_KILLS
    assert storm.non_finite_tensors(run_dir) == []


def epoch_tokens(run_dir: Path) -> int:
    manifest = Run.open(run_dir).manifest()
    return int(manifest["splits"]["train"]["n_tokens"])  # type: ignore[index,call-overload]

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


@pytest.fixture(scope="module")
def undisturbed(make_run: MakeRun) -> Path:
    run_dir = make_run("undisturbed", **storm.LONG)
    storm.finish(run_dir)
    return run_dir


@pytest.mark.parametrize(("path", "n_kills"), [("plain", N_KILLS), ("blocked", 8), ("tiled", 4)])
def test_killed_again_and_again(
    path: str, n_kills: int, make_run: MakeRun, request: pytest.FixtureRequest, moments: random.Random
) -> None:
    if path == "plain":
        undisturbed = request.getfixturevalue("undisturbed")
    else:
        undisturbed = make_run("undisturbed", **storm.RUNS[path])
        storm.finish(undisturbed)
    assert Run.open(undisturbed).status().tokens > epoch_tokens(undisturbed), "the run must go beyond an epoch's end"
    kills: list[int] = []
    most_in_an_epoch = 0
    while len(kills) < n_kills:
        run_dir = make_run("killed", **storm.RUNS[path])
        killed_at = storm.kill_until_done(run_dir, n_kills - len(kills), moments)
        assert killed_at, "the run is too short for this test"
        assert storm.differences(run_dir, undisturbed) == []
        assert [record["step"] for record in storm.figures(run_dir) if "loss_nats" in record] == list(range(1, 401))
        status = Run.open(run_dir).status()
        assert (status.step, status.restarts, status.cause) == (400, len(killed_at), None)
        kills += killed_at
        epochs = Counter(step * 6 * 32 // epoch_tokens(run_dir) for step in killed_at)
        most_in_an_epoch = max(most_in_an_epoch, *epochs.values())
    assert most_in_an_epoch >= 3 or path == "tiled"
    assert storm.non_finite_tensors(run_dir) == []


def test_asked_to_stop_it_loses_no_step(make_run: MakeRun, undisturbed: Path, moments: random.Random) -> None:
    requests = [["SIGTERM"], ["SIGTERM", "SIGTERM"], ["SIGINT"], ["SIGHUP"], ["SIGTERM", "SIGKILL"]]
    n_stopped = 0
    for _ in range(10):  # a run may be done before its signal comes
        if not requests:
            break
        run_dir = make_run("stopped", **storm.LONG)
        while requests:
            lost = storm.stop_at_random(run_dir, requests[0], moments)
            if lost < 0:
                break
            assert lost == 0 or "SIGKILL" in requests[0]
            assert lost <= 7
            requests.pop(0)
            n_stopped += 1
        storm.finish(run_dir)
        assert storm.differences(run_dir, undisturbed) == []
    assert n_stopped == 5


def epoch_tokens(run_dir: Path) -> int:
    manifest = Run.open(run_dir).manifest()
    return int(manifest["splits"]["train"]["n_tokens"])  # type: ignore[index,call-overload]

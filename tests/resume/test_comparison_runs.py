"""A comparison that is killed goes on to the same figures; asked to stop, it says so."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hydra.data import Batch
from hydra.errors import RunError, SpikeError
from hydra.runtime import Run
from hydra.runtime.signals import StopRequest
from hydra.testing import storm
from scripts.compare import TUNING_SEED, Comparer
from scripts.comparison import ComparisonConfig
from scripts.config import TrainingConfig
from scripts.launch import write_config_once
from scripts.trainer import Trainer

COMPARER = "scripts.compare"
CORPUS = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def make_comparison(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, **parameters: object) -> Path:
        config = ComparisonConfig.from_parameters(
            {
                "preset": "tiny",
                "arms": ["ccgqa"],
                "equal": ["parameters"],
                "cost_lengths": [16],
                "max_steps": 6,
                "context_length": 64,
                "corpus": str(CORPUS),
                "data_dir": str(tmp_path / "data"),
                **parameters,
            }
        )
        write_config_once(config, tmp_path / name)
        return tmp_path / name

    return make


def start(run_dir: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", COMPARER, str(run_dir)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(run_dir: Path) -> dict[str, Any]:
    process = start(run_dir)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads((run_dir / "results.json").read_text())


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the clock."""
    found = results["comparisons"]["parameters"]
    differences = {arm["name"]: arm["differences"] for arm in found["comparison"]["arms"]}
    return {"figures": found["figures"], "rates": found["learning_rates"], "differences": differences}


def test_killed_and_stopped_it_ends_at_the_same_figures(
    make_comparison: Callable[..., Path], moments: random.Random
) -> None:
    expected = finish(make_comparison("whole"))
    run_dir = make_comparison("killed")
    for kill in range(3):
        process = start(run_dir)
        wait_for_runs(process, run_dir, 1 + 3 * kill)
        time.sleep(moments.uniform(0.0, 0.8))
        if kill == 2:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 75
            status = Run(run_dir).status()
            assert (status.status, status.cause) == ("interrupted", "SIGTERM")
        else:
            process.kill()
            process.wait()
            assert Run(run_dir).status().status == "interrupted"
    results = finish(run_dir)
    assert figures(results) == figures(expected)
    status = Run(run_dir).status()
    assert (status.status, status.unit, status.step, status.max_steps) == ("done", "run", 12, 12)
    assert status.restarts >= 3

    by_seed = results["comparisons"]["parameters"]["figures"]
    assert set(by_seed) == {"gqa(n_kv_heads=4)", "ccgqa"}
    assert all(set(of_arm) == {"0", "1", "2"} for of_arm in by_seed.values())
    costs = results["costs"]["16"]["ccgqa"]
    assert costs["cache_bytes"] == costs["cache_bytes_by_formula"] > 0
    assert all(value > 0 for value in costs.values())
    # Finished, it is not run again.
    before = (run_dir / "results.json").stat().st_mtime_ns
    finish(run_dir)
    assert (run_dir / "results.json").stat().st_mtime_ns == before


def test_stopped_while_torch_is_imported_it_says_so(
    make_comparison: Callable[..., Path],
    stopped_while_torch_is_imported: "Callable[[Callable[[], subprocess.Popen[str]]], str]",
) -> None:
    run_dir = make_comparison("importing")
    stopped_while_torch_is_imported(lambda: start(run_dir))
    status = Run(run_dir).status()
    assert (status.status, status.cause, status.step) == ("interrupted", "SIGTERM", 0)


def test_a_full_disk_ends_it_by_that_name(make_comparison: Callable[..., Path]) -> None:
    run_dir = make_comparison("full")
    errors = storm.finish(run_dir, [{"fault": "full_disk", "pattern": ".results.json.*", "step": 1}], 1, COMPARER)
    assert "Traceback" not in errors
    assert f"must be able to write {run_dir / 'results.json'}, but the disk is full" in errors
    status = Run(run_dir).status()
    assert (status.status, status.cause) == ("failed", "disk full")


@pytest.mark.parametrize(
    ("seeds", "reason"),
    [
        ({1}, "it diverged on seed 1 at the rate that was best in tuning (loss spike)"),
        ({TUNING_SEED}, "it diverged at every learning rate that was tried (loss spike)"),
    ],
)
def test_an_arm_whose_loss_leaps_and_stays_finite_is_left_out_and_not_trained_again(
    make_comparison: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, seeds: set[int], reason: str
) -> None:
    run_dir = make_comparison("leaping", max_steps=2, n_seeds=2, context_length=16, n_layers=1)
    forward_backward = Trainer.forward_backward

    def leaping(self: Trainer, batch: Batch) -> float:
        if self.config.attention == "ccgqa" and self.config.seed in seeds:
            raise SpikeError("as the guard does after six in a row, for which a test has no time")
        return forward_backward(self, batch)

    monkeypatch.setattr(Trainer, "forward_backward", leaping)
    config = ComparisonConfig.from_json((run_dir / "config.json").read_text())
    assert Comparer(config, run_dir, StopRequest()).run() == "done"
    found = json.loads((run_dir / "results.json").read_text())["comparisons"]["parameters"]
    assert found["left_out"] == [{"name": "ccgqa", "reason": reason}]
    assert set(found["figures"]) == {"gqa(n_kv_heads=4)"}
    records = Run(run_dir).metrics()
    assert sum(record.get("diverged") == "loss spike" for record in records) == (1 if seeds == {1} else 3)

    def untouched(self: Trainer, batch: Batch) -> float:
        raise AssertionError("what is settled is trained again")

    monkeypatch.setattr(Trainer, "forward_backward", untouched)
    (run_dir / "state.json").unlink()
    assert Comparer(config, run_dir, StopRequest()).run() == "done"


def test_a_folder_of_the_other_kind_is_refused(make_comparison: Callable[..., Path]) -> None:
    run_dir = make_comparison("comparison")
    with pytest.raises(RunError, match="is a comparison; give another run_dir"):
        write_config_once(TrainingConfig(), run_dir)


def wait_for_runs(process: "subprocess.Popen[str]", run_dir: Path, n_runs: int) -> None:
    """Until this process owns the comparison and so many runs are counted, maybe by those before it."""
    deadline = time.monotonic() + 120
    while (status := Run(run_dir).status()).pid != process.pid or status.step < n_runs:
        assert process.poll() is None, "the comparison ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)

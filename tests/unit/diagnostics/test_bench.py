"""The benchmark's own parts: equal costs, a peer that is what it says, a gate that holds, a busy machine refused."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from diagnostics.bench import machine, side_by_side
from diagnostics.bench.contestants.nanogpt import NanoGPT, cosine
from diagnostics.bench.equal_models import Shape, peer_spec
from diagnostics.bench.gate import largest_regret
from diagnostics.bench.time_to_loss import RACES
from diagnostics.bench.workers import Worker
from hydra.model.framework.model import HydraModel
from scripts.config import TrainingConfig

ROOT = Path(__file__).parents[3]
SMALL = Shape(vocab_size=64, n_layers=1, d_model=48, n_heads=2, n_tokens=16, n_rows=4)


def test_contestants_cost_the_same_matmul_flops_per_token() -> None:
    """Within 1 %: the weights that multiply, counted in the models themselves."""
    shape = Shape()
    with torch.device("meta"):
        ours = HydraModel(TrainingConfig.preset("debug", **shape.hydra_config("data")).model_spec())
        theirs = NanoGPT(shape.vocab_size, shape.n_tokens, shape.d_model, shape.n_layers, shape.n_heads, 0.0)
    causal = 6 * shape.n_layers * shape.d_model * (shape.n_tokens + 1)
    assert ours.flops_per_token(shape.n_tokens) == pytest.approx(shape.matmul_flops_per_token, rel=0.01)
    matrices = sum(p.numel() for name, p in theirs.named_parameters() if p.ndim == 2 and "positions" not in name)
    assert 6 * matrices + causal == pytest.approx(shape.matmul_flops_per_token, rel=0.01)
    # A gated network of three matrices has the weights of two.
    gated = 3 * shape.d_model * shape.d_gated_feed_forward
    assert gated == pytest.approx(2 * shape.d_model * 4 * shape.d_model, rel=0.01)


def test_the_recipe_is_a_causal_language_model() -> None:
    torch.manual_seed(0)
    model = NanoGPT(11, 8, 16, 2, 2, 0.0).double()
    inputs, targets = torch.randint(11, (2, 8)), torch.randint(11, (2, 8))
    changed = inputs.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    # Losses of the first five tokens alone do not see what comes after them.
    assert torch.equal(model(inputs[:, :5], targets[:, :5]), model(changed[:, :5], targets[:, :5]))
    assert model(inputs, targets) != model(changed, targets)
    assert sum(p.numel() for p in NanoGPT(65, 64, 128, 4, 4, 0.0).parameters()) == pytest.approx(0.80e6, rel=0.02)


def test_a_contestant_steps_only_when_it_is_asked(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "batches.npy", rng.integers(64, size=(3, SMALL.n_rows, SMALL.n_tokens + 1)).astype(np.int32))
    worker = Worker.start("small", "nanogpt", peer_spec(SMALL, tmp_path / "batches.npy", threads=1))
    try:
        assert len(worker.ask(do="calibrate")["gflops"]) == len(SMALL.gemm_shapes())
        first = worker.ask(do="steps", n=3)
        assert len(first["losses"]) == 3
        assert first["seconds"] > 0
        again = [worker.ask(do="steps", n=3)["losses"][0] for _ in range(8)]
        assert again[-1] < first["losses"][0]  # the same batch again: it has been learnt
        memory = worker.ask(do="memory")
        assert memory["peak_mib"] >= memory["baseline_mib"] > 50
    finally:
        worker.stop()
    assert worker.process.returncode == 0


def test_a_contestant_that_ends_is_told_with_its_log() -> None:
    worker = Worker.start("broken", "nanogpt", {"threads": 1})
    with pytest.raises(RuntimeError, match=r"broken must answer, but it ended:\n(.|\n)*KeyError: 'gemm_shapes'"):
        worker.ask(do="steps", n=1)


def wait_often() -> None:
    """A process takes a while to start."""
    for _ in range(20):
        machine.wait_until_quiet()


def test_a_busy_machine_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child's child counts as somebody else's work, as another user's would."""
    monkeypatch.setattr(machine, "PATIENCE_S", 0.0)
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        with pytest.raises(machine.BusyError, match="must be quiet"):
            wait_often()
    finally:
        subprocess.run(["pkill", "--session", str(process.pid)], check=True)
        process.wait()


class Answers:
    """A worker that gives what it is told to, in turn."""

    def __init__(self, name: str, gemm_gflops: list[float]) -> None:
        self.name, self.losses = name, [0.0]
        self._gemm_gflops = iter(gemm_gflops)

    def ask(self, do: str, n: int = 0) -> dict[str, object]:
        return (
            {"gflops": [1.0, next(self._gemm_gflops)]} if do == "calibrate" else {"seconds": 2.0, "losses": [0.0] * n}
        )


def test_segments_beside_other_work_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "wait_until_quiet", lambda: None)
    monkeypatch.setattr(machine.Watch, "busy", lambda self: {})
    steady = Answers("steady", [100.0] * 10)
    drifting = Answers("drifting", [100.0, 90.0, 80.0, 80.0, *[98.0] * 10])  # the second was slow on both sides
    never = Answers("never", [100.0, 50.0] * 10)
    segments = side_by_side.time_in_turn([steady, drifting, never], n_steps=1)
    assert [segments[name].are_enough for name in ("steady", "drifting", "never")] == [True, True, False]
    assert segments["drifting"].peaks_gflops == [98.0] * 5
    assert segments["never"].seconds == []


def test_a_segment_beside_others_at_work_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "wait_until_quiet", lambda: None)
    monkeypatch.setattr(machine.Watch, "busy", lambda self: {"cc1plus [7]": 0.5})
    segments = side_by_side.time_in_turn([Answers("steady", [100.0] * 20)], n_steps=1)
    assert segments["steady"].seconds == []


def test_work_that_begins_within_a_segment_is_seen() -> None:
    watch = machine.Watch.start()
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        time.sleep(0.5)
        assert watch.busy()
    finally:
        subprocess.run(["pkill", "--session", str(process.pid)], check=True)
        process.wait()


def test_a_token_that_is_not_greedy_shows() -> None:
    logits_TV = torch.tensor([[0.0, 1.0, 3.0], [5.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    logits_of = lambda ids_BT: logits_TV[None, : ids_BT.shape[1]]  # noqa: E731
    assert largest_regret([0], [2, 0, 1], logits_of) == 0.0
    assert largest_regret([0], [1, 0, 1], logits_of) == pytest.approx(2.0)
    assert largest_regret([0, 0], [0, 2], logits_of) == pytest.approx(2.0)


def test_the_recipes_rate_ends_at_a_tenth_in_steps_or_in_time() -> None:
    steps = {"warmup_steps": 100, "max_steps": 2000, "seconds": None}
    assert cosine(steps, 50, 0.025) == cosine(steps, 100, 0.05) == 1.0
    assert cosine(steps, 1050, 0.525) == pytest.approx(0.55)
    assert cosine(steps, 2000, 1.0) == pytest.approx(0.1)
    timed = {"warmup_steps": 100, "max_steps": None, "seconds": 600.0}
    assert cosine(timed, 37, 0.5) == pytest.approx(0.55)
    assert cosine(timed, 99, 1.0) == pytest.approx(0.1)


@pytest.mark.parametrize("name", sorted(RACES))
def test_a_race_is_run_by_a_config_with_no_more_parameters_than_the_recipe(name: str) -> None:
    race, n_characters = RACES[name], 65
    recipe = race.recipe
    theirs = NanoGPT(n_characters, *(recipe[key] for key in ("n_tokens", "d_model", "n_layers", "n_heads")), 0.0)
    config = TrainingConfig.preset("debug", tokenizer="characters", **race.config)
    with torch.device("meta"):
        ours = HydraModel(config.model_spec(n_characters + 1))  # one for the start of a document
    assert ours.n_parameters() <= sum(parameter.numel() for parameter in theirs.parameters())


def test_an_unknown_part_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diagnostics.bench", "speed"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "throughput" in done.stderr

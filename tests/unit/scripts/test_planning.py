"""Plans of real configs: presets, monotony, refusal, and what the trainer makes of a plan."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra.attention.core import KERNELS, choose_kernel
from hydra.errors import ConfigError, MemoryLimitError
from hydra.kernels.dispatch import is_triton_installed
from hydra.model.framework import HydraModel
from hydra.runtime import Run
from hydra.runtime.choices import Choices, settle
from hydra.runtime.memory import HostMemory
from hydra.runtime.memory.plan import Rung
from scripts import planning
from scripts.config import PRESETS, TrainingConfig
from scripts.planning import forecast, plan_memory, predict_peak, rehearse
from scripts.preparation import settle_memory
from scripts.trainer import Trainer

GIB = 2**30
SIZES = {"50M": 50e6, "100M": 100e6, "250M": 250e6, "500M": 500e6, "750M": 750e6, "1B": 1e9, "1.5B": 1.5e9}
BYTES = 257  # entries of the vocabulary
EAGER = Choices(device="cpu", threads=1, dtype="bfloat16", attention_kernel="blocked")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("plans"))


def config_of(data_dir: str, **fields: Any) -> TrainingConfig:
    """Few operators, so that a rehearsal takes a fraction of a second."""
    small: dict[str, Any] = {"attention": "gqa", "d_model": 64, "d_feed_forward": 256, "context_length": 64}
    return TrainingConfig.preset("tiny", **{"data_dir": data_dir, **small, "batch_size": 8, **fields})


def total(config: TrainingConfig, micro_batch_size: int = 8, kept: str = "none") -> int:
    return predict_peak(config, EAGER, config.vocab_size, Rung(micro_batch_size, kept)).total


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_parameters_they_are_named_for(name: str) -> None:
    with torch.device("meta"):
        model = HydraModel(TrainingConfig.preset(name).model_spec())
    assert model.n_parameters() == pytest.approx(SIZES[name], rel=0.05)


def test_presets_have_plans_that_grow_with_them(data_dir: str) -> None:
    assert set(PRESETS) - set(SIZES) == {"debug", "small", "tiny"}
    totals = []
    for name in SIZES:
        # One block is enough: all are alike, and rehearsing every one takes seconds.
        config = TrainingConfig.preset(name, data_dir=data_dir, compile_from_step=None, n_layers=1)
        choices = dataclasses.replace(EAGER, attention_kernel=choose_kernel("cpu", config.context_length)[0])
        plan = plan_memory(config, choices, config.vocab_size, HostMemory(10**15, "test"))
        assert plan.micro_batch_size * config.context_length == planning.MICRO_BATCH_TOKENS
        assert plan.micro_batch_size * plan.n_micro_batches == config.batch_size
        totals.append(plan.prediction.total)
    assert totals == sorted(totals)


def test_memory_grows_with_rows_depth_and_length_and_falls_with_checkpointing(data_dir: str) -> None:
    config = config_of(data_dir)
    assert total(config, 2) < total(config, 4) < total(config, 8)
    assert total(config) < total(config_of(data_dir, n_layers=3)) < total(config_of(data_dir, n_layers=4))
    lengths = [total(config_of(data_dir, context_length=n)) for n in (32, 64, 128)]
    assert lengths == sorted(set(lengths))
    deep = config_of(data_dir, n_layers=4)
    assert total(deep, kept="full") < total(deep, kept="selective") < total(deep)


def test_compiled_blocks_take_less_and_the_budget_less_again(data_dir: str) -> None:
    eager, compiled = config_of(data_dir, n_layers=4), config_of(data_dir, n_layers=4, compile_from_step=0)

    def activations(config: TrainingConfig, kept: str) -> int:
        prediction = predict_peak(config, EAGER, config.vocab_size, Rung(8, kept))
        return prediction.total - prediction.process

    assert activations(compiled, "none") < activations(eager, "none")
    assert activations(compiled, "full") < activations(compiled, "selective") < activations(compiled, "none")


def test_predictions_are_kept(data_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(data_dir, d_model=32)
    first = total(config)
    monkeypatch.setattr(planning, "rehearse", None)
    assert total(config) == first
    with pytest.raises(TypeError):
        total(config_of(data_dir, d_model=96))


def test_what_does_not_fit_is_cut_smaller_then_computed_again_then_refused(data_dir: str) -> None:
    config = config_of(data_dir, n_layers=4, micro_batch_size=0)
    largest, small, full = total(config), total(config, 1), total(config, 1, "full")

    def plan(limit: int, **fields: Any) -> Any:
        return plan_memory(
            dataclasses.replace(config, **fields), EAGER, config.vocab_size, HostMemory(int(limit / 0.9) + 1, "test")
        )

    assert plan(largest).micro_batch_size == 8
    assert (plan(largest - 1).activation_checkpointing, plan(largest - 1).micro_batch_size < 8) == ("none", True)
    assert plan(small).n_micro_batches == 8
    assert plan(small - 1).activation_checkpointing != "none"
    assert plan(full).activation_checkpointing == "full"
    with pytest.raises(MemoryLimitError, match=r"takes? at most .* MiB \(test\), but needs .* would fit"):
        plan(full - 1)
    with pytest.raises(MemoryLimitError, match=r"micro_batch_size=0, activation_checkpointing=auto, .* would fit"):
        plan(full + 1, micro_batch_size=8, activation_checkpointing="none")
    with pytest.raises(MemoryLimitError, match=r"(n_layers|context_length)=\d+ would fit"):
        plan(total(config_of(data_dir, n_layers=1), 1, "full") + 2**16)


def test_on_a_gpu_the_optimizer_leaves_when_nothing_else_fits(data_dir: str) -> None:
    """No GPU is needed to plan for one; what is compared is what moves to the host."""
    gpu = dataclasses.replace(EAGER, device="cuda")
    config = config_of(data_dir, n_layers=4, micro_batch_size=0)

    def predicted(offload: bool) -> Any:
        return predict_peak(config, gpu, config.vocab_size, Rung(1, "full", offload))

    on_gpu, moved = predicted(False), predicted(True)
    with torch.device("meta"):
        model = HydraModel(config.model_spec(config.vocab_size))
    lookups = sum(p.numel() for name, p in model.named_parameters() if name in model.lookup_names())
    others = model.n_parameters() - lookups
    assert on_gpu.parameters == 4 * lookups + (4 + 2) * others
    assert moved.parameters == 4 * lookups + 2 * others
    assert on_gpu.process == on_gpu.allocator == 0 < on_gpu.optimizer
    assert moved.optimizer == 0 < on_gpu.optimizer <= moved.on_host - 4 * (others + lookups)
    assert moved.total <= on_gpu.total - on_gpu.optimizer - 4 * others

    def plan(limit: int, **fields: Any) -> Any:
        asked = dataclasses.replace(config, **fields)
        return plan_memory(asked, gpu, config.vocab_size, HostMemory(int(limit / 0.9) + 1, "test"))

    assert plan(on_gpu.total).optimizer_offload is False
    assert plan(on_gpu.total - 1).optimizer_offload is True
    assert plan(on_gpu.total, optimizer_offload="yes").activation_checkpointing == "none"
    with pytest.raises(MemoryLimitError, match="optimizer_offload=no"):
        plan(on_gpu.total - 1, optimizer_offload="no")
    with pytest.raises(ConfigError, match="optimizer_offload must be no or auto"):
        plan_memory(dataclasses.replace(config, optimizer_offload="yes"), EAGER, config.vocab_size)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_far_too_large_is_told_without_a_rehearsal(
    data_dir: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = dataclasses.replace(EAGER, device=device)
    config = config_of(data_dir)
    bound = planning.least_bytes_of(config, choices, config.vocab_size)
    assert 0 < bound < predict_peak(config, choices, config.vocab_size, Rung(1, "full", device == "cuda")).total
    monkeypatch.setattr(planning, "rehearse", None)
    huge = config_of(data_dir, d_model=2**16, d_feed_forward=2**18, n_layers=100)
    with pytest.raises(MemoryLimitError, match="for weights, gradients and optimizer alone; no number of blocks"):
        plan_memory(huge, choices, huge.vocab_size, HostMemory(16 * GIB, "test"))


def test_copies_for_checkpoints_in_the_background_are_in_the_plan(data_dir: str) -> None:
    at_once, in_background = (config_of(data_dir, checkpoints_in_background=value) for value in (False, True))
    copies = planning.checkpoint_bytes_of(at_once, at_once.vocab_size)

    def predicted(config: TrainingConfig, device: str) -> Any:
        choices = dataclasses.replace(EAGER, device=device)
        return predict_peak(config, choices, config.vocab_size, Rung(4, "none"))

    assert predicted(in_background, "cpu").total == predicted(at_once, "cpu").total + copies
    assert predicted(in_background, "cuda").total == predicted(at_once, "cuda").total
    assert predicted(in_background, "cuda").on_host == predicted(at_once, "cuda").on_host + copies
    limit = HostMemory(int((total(at_once, 4) + copies // 2) / 0.9), "test")
    assert plan_memory(at_once, EAGER, at_once.vocab_size, limit).prediction.checkpoint_copies == 0
    with pytest.raises(MemoryLimitError):
        plan_memory(in_background, EAGER, at_once.vocab_size, limit)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_copies_are_as_large_as_planned(make_run: Callable[..., Path], optimizer: str, dtype: str) -> None:
    run_dir = make_run("copies", optimizer=optimizer, dtype=dtype, checkpoints_in_background=True, max_steps=2)
    trainer = Trainer(TrainingConfig.from_json((run_dir / "config.json").read_text()), run_dir)
    trainer.train()
    assert trainer.background is not None
    copies = trainer.background._copies
    tensors = [tensor for group in ("model", "optimizer") for tensor in copies[group].values()]
    n_bytes = sum(tensor.nbytes for tensor in tensors if tensor.dim())  # counters are numbers
    assert n_bytes == trainer.plan.checkpoint_bytes == trainer.plan.prediction.checkpoint_copies


def test_the_run_keeps_its_plan(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run("plan", micro_batch_size=0, max_steps=6, eval_every=6, checkpoint_every=3)
    config = TrainingConfig.from_json((run_dir / "config.json").read_text())
    trainer = Trainer(config, run_dir)
    trainer.train()
    plan = Run.open(run_dir).memory_plan()
    assert plan is not None and plan == trainer.plan
    resolved = json.loads((run_dir / "environment.json").read_text())["resolved"]
    assert (resolved["micro_batch_size"], resolved["activation_checkpointing"]) == (4, "none")
    assert forecast(config, run_dir).memory == plan
    peak = max(record.get("peak_mem_mib", 0) for record in Run.open(run_dir).metrics())
    assert peak > plan.prediction.parameters / 2**20

    # A second session takes it from the run, whatever would be chosen now, and says when the machine is too small.
    state = json.loads((run_dir / "state.json").read_text())
    (run_dir / "state.json").write_text(json.dumps({**state, "status": "interrupted"}))
    monkeypatch.setattr(planning, "plan_memory", None)
    again = Trainer(config, run_dir)
    again.train()
    assert again.plan == plan
    (run_dir / "state.json").write_text(json.dumps({**state, "status": "interrupted"}))
    monkeypatch.setattr("scripts.preparation.read_memory", lambda device: HostMemory(2**20, "test"))
    with pytest.raises(MemoryLimitError, match="go on where there is more"):
        Trainer(config, run_dir).train()


def test_other_memory_is_planned_with_what_the_run_has_chosen(data_dir: str, tmp_path: Path) -> None:
    config = config_of(data_dir, micro_batch_size=0)
    at_once, chosen = settle_memory(config, tmp_path, EAGER, config.vocab_size)
    assert (chosen.micro_batch_size, chosen.activation_checkpointing) == (8, "none")
    halved = settle(tmp_path, chosen, micro_batch_size=2, activation_checkpointing="selective", optimizer_offload=False)
    assert settle_memory(config, tmp_path, halved, config.vocab_size) == (at_once, halved)

    changed = dataclasses.replace(config, checkpoints_in_background=True)
    with pytest.raises(MemoryLimitError):
        settle_memory(dataclasses.replace(changed, memory_limit_mib=1), tmp_path, halved, config.vocab_size)
    plan, choices = settle_memory(changed, tmp_path, halved, config.vocab_size)
    assert choices == halved
    assert (plan.micro_batch_size, plan.activation_checkpointing) == (2, "selective")
    assert plan.prediction.checkpoint_copies == at_once.checkpoint_bytes > 0

    # A plan of before, which does not tell how large a checkpoint is, nor what it was made for.
    stored = json.loads((tmp_path / "memory.json").read_text())
    (tmp_path / "memory.json").write_text(json.dumps({**stored, "checkpoint_bytes": 0, "planned_for": {}}))
    again, choices = settle_memory(changed, tmp_path, halved, config.vocab_size)
    assert choices == halved
    assert (again.prediction, again.checkpoint_bytes) == (plan.prediction, at_once.checkpoint_bytes)
    assert again.planned_for == plan.planned_for != {}


@pytest.mark.parametrize(
    ("changes", "micro_batch_size"),
    [({"micro_batch_size": 1}, 1), ({"batch_size": 6}, 6), ({"context_length": 32}, 8)],
)
def test_other_rows_are_planned_anew(
    data_dir: str, tmp_path: Path, changes: dict[str, int], micro_batch_size: int
) -> None:
    """Whether a checkpoint is there or not: the plan itself says what it was made for."""
    config = config_of(data_dir, micro_batch_size=0)
    _, chosen = settle_memory(config, tmp_path, EAGER, BYTES)
    halved = settle(tmp_path, chosen, micro_batch_size=4, activation_checkpointing="none", optimizer_offload=False)
    changed = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
    told = forecast(changed, tmp_path).memory
    plan, choices = settle_memory(changed, tmp_path, halved, BYTES)
    assert choices.micro_batch_size == plan.micro_batch_size == told.micro_batch_size == micro_batch_size
    assert plan.prediction == told.prediction


def test_a_run_that_cannot_fit_ends_before_its_first_step(make_run: Callable[..., Path]) -> None:
    run_dir = make_run("too-big", memory_limit_mib=100)
    config = TrainingConfig.from_json((run_dir / "config.json").read_text())
    with pytest.raises(MemoryLimitError, match="memory_limit_mib"):
        Trainer(config, run_dir).train()
    status = Run.open(run_dir).status()
    assert (status.status, status.step, status.cause) == ("failed", 0, "out of memory")


def test_forecast_counts_tokens_time_and_disk(data_dir: str) -> None:
    config = config_of(data_dir, max_steps=100)
    told = forecast(config)
    assert told.n_tokens == 100 * 8 * 64
    in_products = told.n_tokens * told.flops_per_token / (told.flops_per_s * 0.7)
    assert told.seconds == pytest.approx(in_products + told.n_steps * told.overhead_s_per_step)
    assert told.overhead_s_per_step > 0.01
    assert 8 * told.n_parameters < told.checkpoint_bytes <= 13 * told.n_parameters
    assert told.disk_bytes > 3 * told.checkpoint_bytes


@pytest.mark.skipif(not is_triton_installed(), reason="triton is not installed")
def test_a_run_on_tritons_kernels_is_rehearsed_without_a_gpu() -> None:
    """Each leaves one tensor where torch's operators leave several on their way."""
    config = TrainingConfig.preset("tiny", attention="gqa", feed_forward="swiglu")
    n_blocks = {}
    for kernels in ("torch", "triton"):
        choices = dataclasses.replace(EAGER, device="cuda", kernels=kernels, micro_batch_size=4)
        n_blocks[kernels] = len(rehearse(config, choices, 257).blocks)
    assert n_blocks["triton"] < n_blocks["torch"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_attention_kernel_can_be_rehearsed(kernel: str) -> None:
    """Those of a GPU as well, on tensors that stand on the CPU."""
    config = TrainingConfig.preset("tiny", compile_from_step=None)
    choices = dataclasses.replace(EAGER, attention_kernel=kernel, micro_batch_size=4)
    assert rehearse(config, choices, 257).blocks

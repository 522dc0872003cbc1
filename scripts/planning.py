"""What memory a run will take, and how it is cut to fit: hydra.runtime.memory, bound to `TrainingConfig` and `Trainer`.

B rows of a micro-batch, T tokens, D model width.
"""

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from hydra.attention.core import ONLY_ON_GPU
from hydra.data import Batch
from hydra.errors import ConfigError, MemoryLimitError
from hydra.model.framework import HydraModel
from hydra.model.framework.blocks import Block
from hydra.model.framework.checkpointing import SELECTIVE_BUDGET
from hydra.model.framework.execution import CHECKPOINTING
from hydra.optim import state_bytes
from hydra.runtime import paths, workspace_root
from hydra.runtime.choices import Choices, resolve
from hydra.runtime.forecast import Forecast, measure_matrix_rate
from hydra.runtime.memory import HostMemory, MemoryPlan, Prediction, read_memory
from hydra.runtime.memory.compiled import Region, StandIn, map_tensors, trace_region
from hydra.runtime.memory.plan import (
    MIB,
    Rung,
    allowed_memory,
    build_ladder,
    cached_prediction,
    digest_of,
    find_rung,
    predict,
    predict_on_gpu,
    read_plan,
)
from hydra.runtime.memory.tracker import Rehearsal
from scripts.config import TrainingConfig
from scripts.preparation import execution_of, what_to_plan

MICRO_BATCH_TOKENS = 4096
"""Tokens of a micro-batch that is left to choose: more do not make matrix products faster on a CPU, whose caches then
no longer hold what goes from one layer to the next. A GPU takes all that fits."""
SHARE_OF_RATE = 0.7
"""Of the rate of a matrix product alone, which a training step reaches on a CPU (65 to 78 % were measured)."""
OVERHEAD_S = 0.004
"""What a block takes forward and backward on a CPU however narrow it is (3 to 6 ms were measured, uncompiled)."""
N_REHEARSED_STEPS = 3
LEAST = "micro_batch_size=0, activation_checkpointing=auto, optimizer_offload=auto"
PLANS = "memory-plans"  # under data_dir, shared by runs
SOURCES = [
    Path(__file__).parents[1] / name
    for name in ("hydra", "scripts/trainer.py", "scripts/preparation.py", "scripts/planning.py")
]


def plan_memory(
    config: TrainingConfig, choices: Choices, vocab_size: int, host: HostMemory | None = None
) -> MemoryPlan:
    """The first rung of the ladder whose predicted peak this machine allows.

    Args:
        choices: device, dtype and kernel; what it says of memory is not read.
        host: left out, this machine.
    Raises:
        ConfigError: the optimizer is to leave a device that is the host itself.
        MemoryLimitError: naming need, limit and the nearest config that would fit.
    """
    limit = allowed_memory(host or read_memory(choices.device), config.memory_limit_mib)
    offload = _optimizer_offload(config, choices.device)
    ladder = build_ladder(_micro_batch_sizes(config, choices.device), _checkpointing(config), offload)
    predictions: dict[Rung, Prediction] = {}

    def total_of(rung: Rung) -> int:
        predictions[rung] = predict_peak(config, choices, vocab_size, rung)
        return predictions[rung].total

    must = f"a training step must take at most {limit.limit_bytes / MIB:,.0f} MiB ({limit.source}), but needs"
    or_raise = "; or raise memory_limit_mib" if limit.source == "memory_limit_mib" else ""
    least_bytes = least_bytes_of(config, choices, vocab_size)
    if least_bytes > limit.limit_bytes:  # told at once: to rehearse what is far too large takes minutes
        raise MemoryLimitError(
            f"{must} {least_bytes / MIB:,.0f} MiB for weights, gradients and optimizer alone; "
            f"{_nearest_that_fits(config, choices, vocab_size, limit.limit_bytes)}{or_raise}"
        )
    rung, tried = find_rung(ladder, total_of, limit.limit_bytes)
    if rung is None:
        least = min(tried, key=lambda one: tried[one])
        raise MemoryLimitError(
            f"{must} {tried[least] / MIB:,.0f} MiB with micro_batch_size={least.micro_batch_size}, "
            f"activation_checkpointing={least.activation_checkpointing} and "
            f"optimizer_offload={'yes' if least.optimizer_offload else 'no'}; "
            f"{_nearest_that_fits(config, choices, vocab_size, limit.limit_bytes)}{or_raise}"
        )
    prediction = predictions[rung]
    if prediction.on_host:
        _check_host(prediction)
    return MemoryPlan(
        micro_batch_size=rung.micro_batch_size,
        n_micro_batches=config.batch_size // rung.micro_batch_size,
        activation_checkpointing=rung.activation_checkpointing,
        optimizer_offload=rung.optimizer_offload,
        prediction=prediction,
        limit_bytes=limit.limit_bytes,
        limit_source=limit.source,
        checkpoint_bytes=checkpoint_bytes_of(config, vocab_size),
        tried=tuple(tried.items()),
    )


def _check_host(prediction: Prediction) -> None:
    """Return if what leaves the GPU fits this machine's own memory; MemoryLimitError if not."""
    limit = allowed_memory(read_memory("cpu"), 0)
    if prediction.on_host > limit.limit_bytes:
        raise MemoryLimitError(
            f"what a run on a GPU keeps on the host must fit its memory, but the optimizer, where it does not fit the "
            f"GPU, and copies for checkpoints_in_background take {prediction.on_host / MIB:,.0f} MiB and "
            f"{limit.limit_bytes / MIB:,.0f} MiB are allowed ({limit.source}); take adam_state=8bit, "
            "checkpoints_in_background=False, a smaller model, or a machine with more memory"
        )


def predict_peak(config: TrainingConfig, choices: Choices, vocab_size: int, rung: Rung) -> Prediction:
    """The peak of a training step on this rung; kept under data_dir for the next one who asks."""
    n_micro_batches = min(2, config.batch_size // rung.micro_batch_size)
    compile_from = None if config.compile_from_step is None else min(config.compile_from_step, 1)
    depends_on = {
        "model": config.model_spec(vocab_size).to_dict(),
        "optimizer": dataclasses.asdict(config.optimizer_spec()),
        "execution": [choices.dtype, choices.attention_kernel, choices.kernels, compile_from],
        "shape": [rung.micro_batch_size, n_micro_batches, config.context_length],
        "activation_checkpointing": rung.activation_checkpointing,
        "device": [choices.device, rung.optimizer_offload],
        "torch": torch.__version__,
    }
    on_rung = dataclasses.replace(choices, **dataclasses.asdict(rung))

    def compute() -> Prediction:
        rehearsal = rehearse(config, on_rung, vocab_size)
        if choices.device == "cuda":
            return predict_on_gpu(rehearsal)
        return predict(
            rehearsal,
            is_eager=compile_from != 0,
            has_compiler=compile_from is not None or config.adam_state == "8bit",
            is_accumulating=n_micro_batches > 1,
        )

    plans = workspace_root() / config.data_dir / PLANS
    prediction = cached_prediction(plans, digest_of(depends_on, SOURCES), compute)
    if not config.checkpoints_in_background:
        return prediction
    copies = checkpoint_bytes_of(config, vocab_size)
    if choices.device == "cuda":
        return dataclasses.replace(prediction, on_host=prediction.on_host + copies)
    return dataclasses.replace(prediction, checkpoint_copies=copies)


def checkpoint_bytes_of(config: TrainingConfig, vocab_size: int) -> int:
    """The tensors of one checkpoint: float32 weights and the optimizer's state."""
    with torch.device("meta"):
        model = HydraModel(config.model_spec(vocab_size))
    return 4 * model.n_parameters() + state_bytes(dict(model.named_parameters()), config.optimizer_spec())


def least_bytes_of(config: TrainingConfig, choices: Choices, vocab_size: int) -> int:
    """What a step takes on its device at the least, whatever its activations take: a bound that needs no rehearsal."""
    with torch.device("meta"):
        n_parameters = HydraModel(config.model_spec(vocab_size)).n_parameters()
    weights_and_gradients = 2 * torch.bfloat16.itemsize * n_parameters
    if _optimizer_offload(config, choices.device)[-1]:
        return weights_and_gradients
    return checkpoint_bytes_of(config, vocab_size) + weights_and_gradients // 2


def _micro_batch_sizes(config: TrainingConfig, device: str) -> list[int]:
    if config.micro_batch_size:
        return [config.micro_batch_size]
    most = max(1, MICRO_BATCH_TOKENS // config.context_length) if device == "cpu" else config.batch_size
    return [size for size in range(1, most + 1) if config.batch_size % size == 0]


def _checkpointing(config: TrainingConfig) -> tuple[str, ...]:
    return CHECKPOINTING if config.activation_checkpointing == "auto" else (config.activation_checkpointing,)


def _optimizer_offload(config: TrainingConfig, device: str) -> tuple[bool, ...]:
    if device == "cpu":
        if config.optimizer_offload == "yes":
            raise ConfigError(
                "optimizer_offload must be no or auto when the model is in the host's memory itself, but got yes with "
                "device cpu; set optimizer_offload=no"
            )
        return (False,)
    return {"no": (False,), "yes": (True,), "auto": (False, True)}[config.optimizer_offload]


def _nearest_that_fits(config: TrainingConfig, choices: Choices, vocab_size: int, limit_bytes: int) -> str:
    """In words: what is left to choose, then shorter rows, then fewer blocks; the first that fits."""

    def fits(**fields: Any) -> bool:
        left: dict[str, Any] = {"micro_batch_size": 0, "activation_checkpointing": "auto", "optimizer_offload": "auto"}
        changed = dataclasses.replace(config, **left, **fields)
        if least_bytes_of(changed, choices, vocab_size) > limit_bytes:
            return False
        least = Rung(1, "full", _optimizer_offload(changed, choices.device)[-1])
        return predict_peak(changed, choices, vocab_size, least).total <= limit_bytes

    if fits():
        return f"{LEAST} would fit"
    for context_length in (config.context_length // 2, config.context_length // 4):
        if context_length >= 128 and fits(context_length=context_length):
            return f"context_length={context_length} would fit ({LEAST})"
    low, high = 0, config.n_layers  # high blocks do not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(n_layers=middle) else (low, middle)
    if low:
        return f"n_layers={low} would fit ({LEAST})"
    return "no number of blocks would fit: take a smaller d_model or vocabulary, or a machine with more memory"


def forecast(config: TrainingConfig, run_dir: str | Path | None = None) -> Forecast:
    """What a run of `config` will take; of a run that is there already, the plan that it keeps, where it holds.

    Nothing is started or written but the cache of predictions under data_dir.

    Raises:
        MemoryLimitError: it would not fit this machine.
    """
    run_dir = None if run_dir is None else paths.resolve_run_dir(run_dir)
    stored = read_plan(run_dir) if run_dir else None
    vocab_size = _vocab_size(config, run_dir)
    resolved = paths.read_json(run_dir / paths.ENVIRONMENT).get("resolved") if run_dir else None
    choices = Choices(**resolved) if resolved else resolve(**config.asked_choices())[0]
    to_plan = what_to_plan(config, choices, stored)
    memory = stored if stored and to_plan is None else plan_memory(to_plan or config, choices, vocab_size)
    with torch.device("meta"):
        model = HydraModel(config.model_spec(vocab_size))
    n_parameters = model.n_parameters()
    return Forecast(
        memory=memory,
        n_parameters=n_parameters,
        n_steps=config.max_steps,
        tokens_per_step=config.batch_size * config.context_length,
        flops_per_token=model.flops_per_token(config.context_length),
        flops_per_s=measure_matrix_rate(
            memory.micro_batch_size * config.context_length,
            config.d_model,
            choices.dtype,
            choices.device,
            choices.threads,
        ),
        share_of_rate=SHARE_OF_RATE,
        # Embedding, loss and optimizer together are about as many calls as two blocks.
        overhead_s_per_step=OVERHEAD_S * (config.n_layers + 2) * memory.n_micro_batches,
        checkpoint_bytes=checkpoint_bytes_of(config, vocab_size),
        n_checkpoints=config.keep_checkpoints + config.keep_best,
        n_logged_steps=config.max_steps // config.log_every,
    )


def _vocab_size(config: TrainingConfig, run_dir: Path | None) -> int:
    """Of the run's tokenizer where it is known, else as the config has it; only a corpus tells its characters."""
    manifest = paths.read_json(run_dir / paths.MANIFEST) if run_dir else {}
    if manifest:
        return int(manifest["tokenizer"]["vocab_size"])
    if config.tokenizer in ("bytes", "characters"):
        return 257
    path = workspace_root() / config.tokenizer
    if path.is_file():
        return int(Tokenizer.from_file(str(path)).get_vocab_size())
    return config.vocab_size


def rehearse(config: TrainingConfig, choices: Choices, vocab_size: int) -> Rehearsal:
    """Run the trainer's own code for two optimizer steps and a third gradient on tensors that take no memory.

    The optimizer's state is there from the second step on, and the holes that its work leaves behind from the third. A
    run that is compiled later than at its start is eager in the first step. Of a step with many micro-batches two are
    run, since the first makes the gradients that the others add to.
    """
    from scripts.trainer import Trainer  # it plans its memory by this module

    if choices.attention_kernel in ONLY_ON_GPU:
        # Fake tensors stand on the CPU; what torch's own kernel keeps for its backward pass is as much.
        choices = dataclasses.replace(choices, attention_kernel="scaled_dot_product")
    with torch.device("meta"):
        model = HydraModel(config.model_spec(vocab_size), execution_of(choices))
    trainer = Trainer(config, "rehearsal")  # which it does not touch
    trainer.device = torch.device("cpu")
    batch = blank_batch(min(2 * choices.micro_batch_size, config.batch_size), config.context_length)
    rehearsal = Rehearsal()
    with rehearsal.running():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
        trainer.assemble(model, choices)
        model.train()
        with contextlib.ExitStack() as compiled:
            if config.adam_state == "8bit":
                compiled.enter_context(_adam_as_compiled())
            for step in range(N_REHEARSED_STEPS):
                if config.compile_from_step is not None and step == min(config.compile_from_step, 1):
                    compiled.enter_context(_as_if_compiled(model, rehearsal))
                rehearsal.begin("forward")
                trainer.forward_backward(batch)
                if choices.optimizer_offload:
                    masters = trainer.masters.named.values()
                    rehearsal.move_to_host([*masters, *(master.grad for master in masters if master.grad is not None)])
                if step < N_REHEARSED_STEPS - 1:
                    rehearsal.begin("optimizer")
                    trainer.update_weights(0.0)
    if choices.optimizer_offload:
        for block in rehearsal.blocks:
            block.is_on_host |= block.phase == "optimizer"
    return rehearsal


def blank_batch(n_rows: int, n_tokens: int) -> Batch:
    """A batch of one document a row: memory does not depend on what the tokens are."""
    ids_BT = np.zeros((n_rows, n_tokens), dtype=np.int64)
    return Batch(ids_BT, ids_BT, ids_BT)


@contextlib.contextmanager
def _as_if_compiled(model: HydraModel, rehearsal: Rehearsal) -> Iterator[None]:
    """Within it the model allocates as its compiled form does; blocks of one kind share one trace."""
    regions: dict[Any, Region] = {}
    is_selective = model.execution.activation_checkpointing == "selective"

    def run(block: Block, *arguments: Any) -> Tensor:
        tensors = _tensors_of(arguments)
        spec = dataclasses.replace(block.attention.spec, layer_index=0)
        kind = (block.attention.__class__, spec, *((name, value.shape) for name, value in block.named_parameters()))
        if kind not in regions:
            with rehearsal.paused(), mock.patch.object(block, "forward", type(block).forward.__get__(block)):
                regions[kind] = _trace_block(block, arguments, SELECTIVE_BUDGET if is_selective else 1.0)
        return StandIn.apply(regions[kind], tensors[0], *block.parameters(), *tensors)

    for block in model.typed_blocks():
        block.forward = functools.partial(run, block)  # type: ignore[method-assign]
    model.is_compiled = True
    loss = importlib.import_module("hydra.kernels.linear_cross_entropy")
    with mock.patch.object(loss, "_compiled_loss_and_gradient", return_value=_fused_loss):
        yield


@contextlib.contextmanager
def _adam_as_compiled() -> Iterator[None]:
    """Within it AdamW with 8-bit state makes that state and nothing else, as its compiled step does."""
    adam = importlib.import_module("torchao.optim.adam")
    with (
        torch.compiler.set_stance("force_eager"),
        mock.patch.object(adam, "single_param_adam", return_value=None),
    ):
        yield


def _fused_loss(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """What the compiled element-wise part of the loss leaves: a number, and the gradient of the logits."""
    return logits_CV.new_zeros((), dtype=torch.float32), torch.empty_like(logits_CV)


def _tensors_of(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, collect)
    return found


def _trace_block(block: nn.Module, arguments: tuple[Any, ...], memory_budget: float) -> Region:
    class OfTensors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, *tensors: Tensor) -> Tensor:
            given = iter(tensors)
            return self.block(*map_tensors(arguments, lambda _: next(given)))

    inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in _tensors_of(arguments)]
    with torch.enable_grad():
        return trace_region(OfTensors(), inputs, memory_budget)

"""What memory a run will take, and how it is cut to fit: hydra.runtime.memory, bound to `TrainingConfig` and `Trainer`.

B rows of a micro-batch, T tokens, D model width.
"""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from hydra.data import Batch
from hydra.model.framework import HydraModel
from hydra.model.framework.checkpointing import SELECTIVE_BUDGET
from hydra.runtime.choices import Choices
from hydra.runtime.memory.compiled import Region, StandIn, map_tensors, trace_region
from hydra.runtime.memory.tracker import Rehearsal
from scripts.config import TrainingConfig


def rehearse(config: TrainingConfig, choices: Choices, vocab_size: int) -> Rehearsal:
    """Run the trainer's own code for two optimizer steps and a gradient on tensors that take no memory.

    Of a step with many micro-batches two are run: the first makes the gradients that the others add to.
    """
    from scripts.trainer import Trainer, execution_of  # it plans its memory by this module

    with torch.device("meta"):
        model = HydraModel(config.model_spec(vocab_size), execution_of(choices))
    trainer = Trainer(config, ".")
    trainer.device = torch.device("cpu")
    batch = blank_batch(min(2 * choices.micro_batch_size, config.batch_size), config.context_length)
    rehearsal = Rehearsal()
    with rehearsal.running():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
        trainer.assemble(model, choices)
        model.train()
        with _as_if_compiled(model, rehearsal) if config.compile_from_step is not None else contextlib.nullcontext():
            for _ in range(2):
                rehearsal.begin("forward")
                trainer.forward_backward(batch)
                rehearsal.begin("optimizer")
                trainer.update_weights(0.0)
            rehearsal.begin("forward")
            trainer.forward_backward(batch)
    return rehearsal


def blank_batch(n_rows: int, n_tokens: int) -> Batch:
    """A batch of one document a row: memory does not depend on what the tokens are."""
    ids_BT = np.zeros((n_rows, n_tokens), dtype=np.int64)
    return Batch(ids_BT, ids_BT, ids_BT)


@contextlib.contextmanager
def _as_if_compiled(model: HydraModel, rehearsal: Rehearsal) -> Iterator[None]:
    """Within it the model allocates as its compiled form does; all blocks share one trace."""
    regions: list[Region] = []
    is_selective = model.execution.activation_checkpointing == "selective"

    def run(block: nn.Module, x_BTD: Tensor, context: Any) -> Tensor:
        if not regions:
            with rehearsal.paused(), mock.patch.object(block, "forward", type(block).forward.__get__(block)):
                regions.append(_trace_block(block, x_BTD, context, SELECTIVE_BUDGET if is_selective else 1.0))
        return StandIn.apply(regions[0], x_BTD, *block.parameters())

    for block in model.typed_blocks():
        block.forward = lambda x_BTD, context, cache, block=block: run(block, x_BTD, context)  # type: ignore[assignment]
    model.is_compiled = True
    loss = importlib.import_module("hydra.kernels.linear_cross_entropy")
    with mock.patch.object(loss, "_compiled_loss_and_gradient", lambda: _fused_loss):
        yield


def _fused_loss(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """What the compiled element-wise part of the loss leaves: a number, and the gradient of the logits."""
    return logits_CV.new_zeros((), dtype=torch.float32), torch.empty_like(logits_CV)


def _trace_block(block: nn.Module, x_BTD: Tensor, context: Any, memory_budget: float) -> Region:
    tensors: list[Tensor] = []
    map_tensors(context, lambda tensor: (tensors.append(tensor), tensor)[1])

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x_BTD: Tensor, *tensors: Tensor) -> Tensor:
            given = iter(tensors)
            return self.block(x_BTD, map_tensors(context, lambda _: next(given)), None)

    with torch.enable_grad():
        return trace_region(Wrapped(), (x_BTD.detach().requires_grad_(), *tensors), memory_budget)

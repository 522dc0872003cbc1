"""What memory a run will take, and how it is cut to fit: hydra.runtime.memory, bound to `TrainingConfig` and `Trainer`.

B rows of a micro-batch, T tokens.
"""

import numpy as np
import torch
from torch import nn

from hydra.data import Batch
from hydra.model.framework import HydraModel
from hydra.runtime.choices import Choices
from hydra.runtime.memory.tracker import Rehearsal
from scripts.config import TrainingConfig


def rehearse(config: TrainingConfig, choices: Choices, vocab_size: int) -> Rehearsal:
    """Run the trainer's own code for one optimizer step and one micro-batch on tensors that take no memory.

    The optimizer comes first, so that its state and, with several micro-batches, the gradient that they add up are
    there when the micro-batch passes: as in every step but the first.
    """
    from scripts.trainer import Trainer, execution_of  # it plans its memory by this module

    with torch.device("meta"):
        model = HydraModel(config.model_spec(vocab_size), execution_of(choices))
    trainer = Trainer(config, ".")
    trainer.device = torch.device("cpu")
    rehearsal = Rehearsal()
    with rehearsal.running():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
        trainer.assemble(model, choices)
        rehearsal.begin("gradients")
        _make_gradients(trainer.masters.named.values())
        rehearsal.begin("optimizer")
        trainer.update_weights(0.0)
        if config.batch_size > choices.micro_batch_size:
            rehearsal.begin("gradients")
            _make_gradients(trainer.masters.named.values())
        rehearsal.begin("forward")
        model.train()
        trainer.forward_backward(blank_batch(choices.micro_batch_size, config.context_length))
    return rehearsal


def blank_batch(n_rows: int, n_tokens: int) -> Batch:
    """A batch of one document a row: memory does not depend on what the tokens are."""
    ids_BT = np.zeros((n_rows, n_tokens), dtype=np.int64)
    return Batch(ids_BT, ids_BT, ids_BT)


def _make_gradients(parameters: "list[nn.Parameter]") -> None:
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)

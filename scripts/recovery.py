"""What goes wrong in a run, by name: what can be gone on from, and how the others end it."""

import itertools
import math
from collections.abc import Mapping

from torch import Tensor, nn

from hydra.attention.code import place_of
from hydra.errors import (
    CheckpointError,
    DataError,
    DiskFullError,
    HydraError,
    MemoryLimitError,
    NotFiniteError,
    OutOfMemoryError,
    SpikeError,
)
from scripts.config import TrainingConfig

CAUSES = {
    NotFiniteError: "not finite",
    SpikeError: "loss spike",
    CheckpointError: "damaged checkpoint",
    DataError: "bad data",
    OutOfMemoryError: "out of memory",
    MemoryLimitError: "out of memory",
    DiskFullError: "disk full",
}
"""How the ledger calls the errors that end a run; others go by their own names."""
CARD = "python -m hydra.testing path.py:Class"


class StartOverError(Exception):
    """The run must go back to its newest checkpoint: weights are damaged, or half of them were stepped."""

    def __init__(self, message: str, *, needs_memory: bool = False) -> None:
        super().__init__(message)
        self.needs_memory = needs_memory


def cause_and_message(error: BaseException) -> tuple[str, str]:
    """What the ledger says of the error that ended a run."""
    if isinstance(error, HydraError):
        return CAUSES.get(type(error), type(error).__name__), str(error)
    place = place_of(error)
    return "error", repr(error) if place is None else f"{error!r}, at {place} (look: {CARD})"


def advise_on_spike(config: TrainingConfig, has_taken_any: bool) -> str:
    """What to do about a loss that is not finite or far too large.

    Args:
        has_taken_any: whether any step has moved the weights.
    """
    if not has_taken_any and config.attention_code:
        return f"No learning rate has acted yet: see whether the attention class is finite, {CARD}"
    if not has_taken_any:
        return "No learning rate has acted yet: these are the first weights; try dtype=float32"
    rates = "learning_rate" if config.optimizer == "adamw" else "muon_learning_rate and learning_rate"
    return f"Lower {rates}, or raise warmup_steps (max_skipped_steps, if it was chance)"


def half_of(micro_batch_size: int, batch_size: int, refusal: str) -> int:
    """The largest size that cuts a batch evenly and is at most half of `micro_batch_size`.

    Raises:
        OutOfMemoryError: a single row cannot be halved.
    """
    if micro_batch_size == 1:
        raise OutOfMemoryError(
            f"a step must fit the memory, but it was refused for one row at a time ({refusal}); use a shorter "
            "context_length, activation_checkpointing full, or a smaller model"
        )
    return next(size for size in range(micro_batch_size // 2, 0, -1) if batch_size % size == 0)


def require_finite_weights(model: nn.Module, masters: Mapping[str, Tensor], step: int) -> None:
    """Return if the weights are finite, as they must be when no step is ever taken from what is not.

    Args:
        masters: float32 weights by name; what `model` computes with are the same, or copies of fewer bits.

    Raises:
        StartOverError: naming a tensor that is not.
    """
    for name, tensor in itertools.chain(masters.items(), model.named_parameters()):
        # The sum is read once and is finite unless something is wrong, or huge.
        if not math.isfinite(float(tensor.detach().sum())) and not bool(tensor.isfinite().all()):
            raise StartOverError(f"the weights {name} are not finite after step {step}")

"""Running a block so that it keeps less for its backward pass, which then computes again what it needs.

Gradients are the same: what is computed again is computed by the same operations from the same values.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
# What costs most to compute again for each byte that it keeps.
KEPT = frozenset({aten.mm.default, aten.addmm.default})
SELECTIVE_BUDGET = 0.5
"""Share of what compiled blocks would keep that `selective` leaves them: their compiler chooses what that is."""


def run_checkpointed(block: Callable[..., Tensor], x_BTD: Tensor, *others: Any, is_selective: bool) -> Tensor:
    """block(x_BTD, *others), keeping the results of matrix products with weights (is_selective), or the input alone.

    Scores and weighted values of attention are batched products; they are many and belong to what is computed again.
    """
    contexts: dict[str, Any] = {}
    if is_selective:
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _decide)
    # preserve_rng_state: a block that draws random numbers draws the same ones again.
    return checkpoint(block, x_BTD, *others, use_reentrant=False, preserve_rng_state=True, **contexts)


def _decide(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

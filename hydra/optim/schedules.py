"""Learning rate as a share of its peak: pure functions of the step, so that a resumed run needs no state for them.

`step` counts finished optimizer steps: 0 for the first update, max_steps - 1 for the last.
"""

import math
from collections.abc import Callable
from functools import partial


def _warmup(step: int, warmup_steps: int) -> float:
    """Linear rise; the first update already moves, the update after `warmup_steps` is the first at the peak."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def warmup_stable_decay(
    step: int, *, max_steps: int, warmup_steps: int, decay_fraction: float, final_fraction: float
) -> float:
    """Linear warm-up, a plateau at 1, then a linear fall to `final_fraction` over the last `decay_fraction` of steps.

    Where a short run makes warm-up and fall overlap, their factors multiply. The fall reaches `final_fraction` one step
    after the last update, so that no update is lost to a rate of 0.
    Source: the trapezoid of Hägele et al., arXiv 2405.18392.
    """
    n_decay = round(decay_fraction * max_steps)
    fall = min(1.0, (max_steps - step) / n_decay) if n_decay else 1.0
    return _warmup(step, warmup_steps) * (final_fraction + (1.0 - final_fraction) * fall)


def cosine(step: int, *, max_steps: int, warmup_steps: int, final_fraction: float) -> float:
    """Linear warm-up, then half a cosine from 1 to `final_fraction` (Loshchilov and Hutter, arXiv 1608.03983)."""
    progress = max(0.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return _warmup(step, warmup_steps) * (
        final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))
    )


def build_schedule(
    name: str, *, max_steps: int, warmup_steps: int, decay_fraction: float, final_fraction: float
) -> Callable[[int], float]:
    """The schedule `warmup_stable_decay` or `cosine` as a function of the step alone."""
    if name == "cosine":
        return partial(cosine, max_steps=max_steps, warmup_steps=warmup_steps, final_fraction=final_fraction)
    assert name == "warmup_stable_decay", name
    return partial(
        warmup_stable_decay,
        max_steps=max_steps,
        warmup_steps=warmup_steps,
        decay_fraction=decay_fraction,
        final_fraction=final_fraction,
    )

"""Which optimizer steps are not taken: those whose loss or gradient is not finite, or far beyond what was usual."""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

WINDOW_STEPS = 128
FEWEST_STEPS = 32
"""Until so many steps were taken nothing is known of what is usual, and only what is not finite counts."""
NORMAL_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
MOST_IN_A_ROW = 5
"""More than so many skipped steps one after the other are no accident but the end of learning."""
LEAST_FACTOR = {"loss_nats": 1.2, "grad_norm": 4.0}
"""What lies below this multiple of the median is usual, however quiet the steps before were."""


class SpikeGuard:
    """Compares each step with the window of those before it that were taken, by median and median absolute deviation.

    A pure function of the losses and gradient norms of the run, kept in its checkpoints, so that it decides the same
    whether the run was interrupted or not.
    """

    def __init__(self, deviations: float) -> None:
        """deviations: standard deviations above the median from which on a step is not taken; 0: any finite one is."""
        self._deviations = deviations
        self._taken: dict[str, deque[float]] = {name: deque(maxlen=WINDOW_STEPS) for name in LEAST_FACTOR}
        self.skipped_steps: list[int] = []
        """Numbers of the steps that were not taken, the first being 1."""

    def finds(self, loss_nats: float, grad_norm: float) -> str | None:
        """Why a step of this loss and gradient norm is not to be taken; None if it is."""
        for name, value in (("loss_nats", loss_nats), ("grad_norm", grad_norm)):
            if not math.isfinite(value):
                return f"{name} is {value}"
            limit = self._limit(name)
            if value > limit:
                return (
                    f"{name} is {value:.6g}, beyond {limit:.6g}, which the {len(self._taken[name])} steps before allow"
                )
        return None

    def may_skip(self, step: int, most: int) -> bool:
        """Whether step number `step` may be skipped too, if the run may skip `most`: not before one was taken."""
        is_in_a_row = self.skipped_steps[-MOST_IN_A_ROW:] == list(range(step - MOST_IN_A_ROW, step))
        return self.has_taken_any and len(self.skipped_steps) < most and not is_in_a_row

    @property
    def has_taken_any(self) -> bool:
        """Whether a step was taken yet: until then what is not finite is so by the first weights, or by the data."""
        return bool(self._taken["loss_nats"])

    def remember(self, loss_nats: float, grad_norm: float) -> None:
        """Count a step that was taken."""
        self._taken["loss_nats"].append(loss_nats)
        self._taken["grad_norm"].append(grad_norm)

    def _limit(self, name: str) -> float:
        values = self._taken[name]
        if self._deviations == 0 or len(values) < FEWEST_STEPS:
            return math.inf
        median = statistics.median(values)
        deviation = NORMAL_MAD * statistics.median(abs(value - median) for value in values)
        return max(median + self._deviations * deviation, LEAST_FACTOR[name] * median)

    def state(self) -> dict[str, object]:
        """What a checkpoint holds of it."""
        taken = {name: list(values) for name, values in self._taken.items()}
        return {"skipped_steps": list(self.skipped_steps), **taken}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        self.skipped_steps = list(state["skipped_steps"])
        for name, values in self._taken.items():
            values.clear()
            values.extend(state[name])

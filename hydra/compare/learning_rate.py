"""The learning rate of every arm, chosen with the same effort for each.

Choose on seeds other than those that the arms are compared on: the luckiest of several runs flatters its arm.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hydra.errors import ComparisonError

MIN_RATES = 3


@dataclass(frozen=True)
class LearningRateChoice:
    """The best of the tried learning rates, its figure, and whether the grid ended there.

    `at_edge` means that a better rate may lie outside of what was tried: a comparison with this arm is not fair yet.
    """

    learning_rate: float
    figure: float
    at_edge: bool
    n_tried: int

    def warning(self, arm: str) -> str | None:
        """What a report must say about it, or None."""
        if not self.at_edge:
            return None
        return (
            f"The best learning rate of {arm}, {self.learning_rate:g}, stands at an edge of the {self.n_tried} that"
            " were tried: a better one may lie beyond it, and until the grid goes further the comparison is not fair."
        )


def choose_learning_rate(figures: Mapping[float, float], *, larger_is_better: bool = False) -> LearningRateChoice:
    """Choose from the figures of one arm by learning rate.

    A figure that is not finite is a run that diverged: it is never the best, and it does bound the grid.
    Of equal figures the smaller rate is taken. Raises ComparisonError for fewer than three rates, or if all diverged.
    """
    if len(figures) < MIN_RATES:
        raise ComparisonError(
            f"learning rates tried must be at least {MIN_RATES}, but got {len(figures)}; add values on both sides"
        )
    sign = -1.0 if larger_is_better else 1.0
    finite = [rate for rate in sorted(figures) if math.isfinite(figures[rate])]
    if not finite:
        raise ComparisonError(f"one learning rate must give a finite figure, but got {dict(figures)}; try smaller ones")
    best = min(finite, key=lambda rate: sign * figures[rate])
    return LearningRateChoice(best, figures[best], best in (min(figures), max(figures)), len(figures))


def choose_learning_rates(
    figures: Mapping[str, Mapping[float, float]], *, larger_is_better: bool = False
) -> dict[str, LearningRateChoice]:
    """Choose for every arm, by name. The grids may differ; their sizes may not, or an arm would be tuned harder.

    Raises ComparisonError when the arms were given different numbers of rates.
    """
    n_tried = {arm: len(of_arm) for arm, of_arm in figures.items()}
    if len(set(n_tried.values())) > 1:
        raise ComparisonError(
            f"every arm must be tuned over equally many learning rates, but got {n_tried}; run the missing ones"
        )
    return {arm: choose_learning_rate(of_arm, larger_is_better=larger_is_better) for arm, of_arm in figures.items()}

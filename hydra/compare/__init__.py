"""Arms compared with a baseline over paired seeds: intervals, verdicts, and what it would take to decide the rest."""

from hydra.compare.arms import ArmResult, compare_arms
from hydra.compare.learning_rate import LearningRateChoice, choose_learning_rate, choose_learning_rates
from hydra.compare.results import ArmComparison, Comparison, Interval, Verdict

__all__ = [
    "ArmComparison",
    "ArmResult",
    "Comparison",
    "Interval",
    "LearningRateChoice",
    "Verdict",
    "choose_learning_rate",
    "choose_learning_rates",
    "compare_arms",
]

"""What a notebook calls: its parameters, its run directory, a view of the run, and the sections of its report."""

from hydra.notebook.comparison import show_arms, show_costs, show_learning_rates, show_verdicts
from hydra.notebook.figures import (
    show_config,
    show_corpus,
    show_curves,
    show_environment,
    show_memory,
    show_plan,
    show_samples,
    show_yardsticks,
)
from hydra.notebook.parameters import read_parameters, run_directory
from hydra.notebook.watch import watch

__all__ = [
    "read_parameters",
    "run_directory",
    "show_arms",
    "show_config",
    "show_corpus",
    "show_costs",
    "show_curves",
    "show_environment",
    "show_learning_rates",
    "show_memory",
    "show_plan",
    "show_samples",
    "show_verdicts",
    "show_yardsticks",
    "watch",
]

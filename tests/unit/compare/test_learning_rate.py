import math

import pytest

from hydra.compare import choose_learning_rate, choose_learning_rates
from hydra.errors import ComparisonError


def test_the_best_of_the_grid_whatever_its_order() -> None:
    choice = choose_learning_rate({1e-2: 3.3, 1e-4: 3.2, 1e-3: 3.0})
    assert (choice.learning_rate, choice.figure, choice.at_edge, choice.n_tried) == (1e-3, 3.0, False, 3)
    assert choice.warning("mla") is None


def test_larger_may_be_better() -> None:
    assert choose_learning_rate({1e-4: 0.2, 1e-3: 0.3, 1e-2: 0.1}, larger_is_better=True).learning_rate == 1e-3
    choices = choose_learning_rates({"mla": {1e-4: 0.2, 1e-3: 0.3, 1e-2: 0.1}}, larger_is_better=True)
    assert choices["mla"].figure == 0.3


@pytest.mark.parametrize("best", [1e-4, 1e-2])
def test_the_best_at_either_edge_is_flagged(best: float) -> None:
    figures = {1e-2: 3.3, 1e-4: 3.2, 1e-3: 3.1, best: 3.0}
    choice = choose_learning_rate(figures)
    assert choice.learning_rate == best and choice.at_edge
    assert choice.warning("mla") == (
        f"The best learning rate of mla, {best:g}, stands at an edge of the 3 that were tried: a better one may lie"
        " beyond it, and until the grid goes further the comparison is not fair."
    )


@pytest.mark.parametrize("diverged", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("larger_is_better", [False, True])
def test_a_run_that_diverged_is_never_best_and_bounds_the_grid(diverged: float, larger_is_better: bool) -> None:
    figures = {1e-4: 3.1, 1e-3: 3.1, 1e-2: diverged}
    figures[1e-3] += 0.1 if larger_is_better else -0.1
    choice = choose_learning_rate(figures, larger_is_better=larger_is_better)
    assert choice.learning_rate == 1e-3 and not choice.at_edge and choice.n_tried == 3


def test_of_equal_figures_the_smaller_rate() -> None:
    assert choose_learning_rate({3e-3: 3.0, 1e-3: 3.0, 1e-4: 3.1, 1e-2: 3.2}).learning_rate == 1e-3


def test_too_few_or_all_diverged_are_refused() -> None:
    with pytest.raises(ComparisonError, match="at least 3, but got 2"):
        choose_learning_rate({1e-3: 3.0, 1e-2: 3.1})
    with pytest.raises(ComparisonError, match="try smaller"):
        choose_learning_rate(dict.fromkeys((1e-3, 1e-2, 1e-1), math.nan))


def test_every_arm_gets_the_same_budget_and_its_own_grid() -> None:
    grid = {1e-4: 3.2, 1e-3: 3.0, 1e-2: 3.3}
    other = {rate * 3: figure for rate, figure in grid.items()}
    choices = choose_learning_rates({"gqa": grid, "lightning": other})
    assert {arm: choice.learning_rate for arm, choice in choices.items()} == {"gqa": 1e-3, "lightning": 3e-3}
    with pytest.raises(ComparisonError, match="'gqa': 3, 'lightning': 4"):
        choose_learning_rates({"gqa": grid, "lightning": {**other, 1e-5: 3.4}})

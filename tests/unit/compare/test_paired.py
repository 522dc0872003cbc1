"""The formulas against scipy's own tests, worked examples, and direct simulation."""

import numpy as np
import pytest
from scipy import special, stats

from hydra.compare import paired

BASE = [3.10, 3.14, 3.02, 3.21, 3.08]
ARM = [3.05, 3.11, 2.99, 3.12, 3.07]


def measured(n: int = 5) -> tuple[float, float]:
    differences = [a - b for a, b in zip(ARM[:n], BASE[:n], strict=True)]
    return sum(differences) / n, paired.spread_of(differences)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_p_value_and_interval_are_those_of_scipys_paired_t_test(n: int) -> None:
    expected = stats.ttest_rel(ARM[:n], BASE[:n])
    mean, spread = measured(n)
    assert paired.t_test(mean, spread, n) == pytest.approx(expected.pvalue, rel=1e-10)
    for level in (0.05, 0.005):
        interval = expected.confidence_interval(1 - level)
        assert paired.t_interval(mean, spread, n, level) == pytest.approx((interval.low, interval.high), rel=1e-10)


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.04, 0.03, 0.02], [0.06, 0.06, 0.06]),
        ([0.9, 0.0001, 0.8], [1.0, 0.0003, 1.0]),
        ([0.2], [0.2]),
    ],
)
def test_holm_by_hand(p_values: list[float], corrected: list[float]) -> None:
    assert paired.holm(p_values) == pytest.approx(corrected)


@pytest.mark.parametrize(("n", "df", "level"), [(3, 2, 0.05), (3, 2, 0.005), (5, 4, 0.05), (8, 7, 0.01), (40, 2, 0.05)])
def test_detectable_effect_has_power_of_80_percent_by_the_noncentral_t(n: int, df: int, level: float) -> None:
    effect = paired.detectable_in_spreads(n, df, level)
    critical = stats.t.ppf(1 - level / 2, n - 1)
    quantiles = (np.arange(2000) + 0.5) / 2000
    known = np.sqrt(stats.chi2.ppf(quantiles, df) / df)
    power = 1 - special.nctdtr(n - 1, np.minimum(effect * known * n**0.5, critical + 30), critical)
    assert power.mean() == pytest.approx(0.8, abs=3e-4)


def test_detectable_effect_comes_to_the_textbook_value_when_the_spread_is_known() -> None:
    """Paired t test, effect of half a standard deviation, 5 % two-sided, 80 %: 34 pairs (Cohen 1988's tables)."""
    assert paired.detectable_in_spreads(34, 10**6, 0.05) <= 0.5 < paired.detectable_in_spreads(33, 10**6, 0.05)


@pytest.mark.parametrize(("n", "promise"), [(3, 0.628), (5, 0.685)])
def test_taking_the_estimated_spread_for_the_true_one_would_promise_too_much(n: int, promise: float) -> None:
    """What the docstring says, so that nobody simplifies it back."""
    naive = paired.detectable_in_spreads(n, 10**6, 0.05)
    known = np.sqrt(stats.chi2.ppf((np.arange(4000) + 0.5) / 4000, n - 1) / (n - 1))
    kept = 1 - special.nctdtr(n - 1, naive * known * n**0.5, stats.t.ppf(0.975, n - 1))
    assert kept.mean() == pytest.approx(promise, abs=0.005)


def test_seeds_to_decide_is_the_least_number_that_detects_the_effect() -> None:
    for effect, n, level in [(1.0, 3, 0.05), (0.5, 5, 0.05), (0.5, 5, 0.005), (0.15, 8, 0.05)]:
        found = paired.seeds_to_decide(effect, n, level)
        assert found is not None
        assert paired.detectable_in_spreads(found, n - 1, level) <= effect
        assert paired.detectable_in_spreads(found - 1, n - 1, level) > effect


def test_seeds_to_decide_agrees_with_what_is_detectable() -> None:
    just_detectable = paired.detectable_in_spreads(9, 4, 0.05)
    assert paired.seeds_to_decide(just_detectable * (1 + 1e-9), 5, 0.05) == 9
    assert paired.seeds_to_decide(just_detectable * (1 - 1e-6), 5, 0.05) == 10


def test_no_reasonable_number_of_seeds_decides_an_effect_of_nearly_nothing() -> None:
    assert paired.seeds_to_decide(0.0, 5, 0.05) is None
    assert paired.seeds_to_decide(0.05, 5, 0.05) is None
    smallest = paired.detectable_in_spreads(999, 4, 0.05)
    assert paired.seeds_to_decide(smallest * (1 + 1e-9), 5, 0.05) == 999
    assert paired.seeds_to_decide(smallest * (1 - 1e-6), 5, 0.05) is None
    assert paired.seeds_to_decide(0.0, 2000, 0.05) is None


def test_seeds_that_were_there_and_did_not_decide_are_not_enough() -> None:
    assert paired.seeds_to_decide(100.0, 5, 0.05) == 6

"""Student's t on paired differences, Holm's correction, and the effects that a number of seeds can find.

Plain numbers in, plain numbers out. `level` is always the two-sided chance of a false alarm of one test, `spread` the
sample standard deviation of the paired differences (divided by n - 1), `n_seeds` their number n.
In names of arrays: K nodes over what the known spread may be, M nodes over the spread of the seeds to come.

Sources: Student, "The probable error of a mean" (1908); Holm, "A simple sequentially rejective multiple test
procedure" (1979); the power of a t test is a tail of the noncentral t distribution (Johnson, Kotz and Balakrishnan,
"Continuous Univariate Distributions" 2, chapter 31).
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import optimize, special

POWER = 0.8
SEEDS_LIMIT = 1000
QUADRATURE_NODES = 32


def spread_of(differences: Sequence[float]) -> float:
    """The sample standard deviation of at least two differences."""
    return float(np.std(differences, ddof=1))


def t_interval(mean: float, spread: float, n_seeds: int, level: float) -> tuple[float, float]:
    """The interval that misses the true mean difference with a chance of `level`."""
    margin = _critical_t(n_seeds, level) * spread / n_seeds**0.5
    return mean - margin, mean + margin


def t_test(mean: float, spread: float, n_seeds: int) -> float:
    """Two-sided p-value of the mean difference against zero, n - 1 degrees of freedom; `spread` must not be zero."""
    return float(2 * special.stdtr(n_seeds - 1, -abs(mean) / (spread / n_seeds**0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the order given.

    Rejecting those that are at most `level` keeps the chance of any false rejection at `level`, however the tests
    depend on each other; they do here, because all arms share the baseline.
    """
    n_tests = len(p_values)
    corrected = [0.0] * n_tests
    largest = 0.0
    for rank, index in enumerate(sorted(range(n_tests), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (n_tests - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


@lru_cache(maxsize=16384)
def detectable_in_spreads(n_seeds: int, spread_df: int, level: float) -> float:
    """The smallest true difference that `n_seeds` find in 80 % of cases, in units of a spread that is an estimate.

    Found means: a two-sided test at `level` rejects, on the right side. With the true standard deviation sigma that is
    P(T > t_critical), T noncentral t with n - 1 degrees of freedom and noncentrality difference * sqrt(n) / sigma.
    What is known is an estimate s of `spread_df` degrees of freedom, with (s / sigma)^2 distributed as chi^2 / df; the
    power is averaged over it. Taking s for sigma would promise 80 % and keep less: 63 % at three seeds, 69 % at five.
    """
    critical = _critical_t(n_seeds, level)
    known_K, weights_K = _spread_over_sigma(spread_df)
    new_M, weights_M = _spread_over_sigma(n_seeds - 1)

    def power_missing(effect: float) -> float:
        # The noncentral t's tail as the mean over its denominator: scipy 1.17's nctdtr is nan far from its centre.
        found_KM = special.ndtr(effect * n_seeds**0.5 * known_K[:, None] - critical * new_M)
        return POWER - float(weights_K @ found_KM @ weights_M)

    upper = 1.0
    while power_missing(upper) > 0:
        upper *= 2
    return float(optimize.brentq(power_missing, 0.0, upper, rtol=1e-8))


def seeds_to_decide(effect_in_spreads: float, n_seeds: int, level: float) -> int | None:
    """The least number of seeds, more than `n_seeds`, that finds a true effect of this size in 80 % of cases.

    The spread is known from `n_seeds`. None when no number below `SEEDS_LIMIT` does.
    """
    candidates = range(n_seeds + 1, SEEDS_LIMIT)
    # Negated: bisect wants rising keys, and more seeds detect smaller effects.
    found = bisect_left(candidates, -effect_in_spreads, key=lambda n: -detectable_in_spreads(n, n_seeds - 1, level))
    return candidates[found] if found < len(candidates) else None


def _critical_t(n_seeds: int, level: float) -> float:
    return float(special.stdtrit(n_seeds - 1, 1 - level / 2))


@lru_cache(maxsize=1024)
def _spread_over_sigma(df: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of s / sigma and their weights, which sum to one: Gauss-Legendre over the quantiles of chi^2."""
    nodes, weights = np.polynomial.legendre.leggauss(QUADRATURE_NODES)
    upper_tail = (1 - nodes) / 2
    return np.sqrt(special.chdtri(df, upper_tail) / df), weights / 2

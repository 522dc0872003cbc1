"""Statistics that do not cry wolf, and do not sleep: simulated comparisons go through the whole of `compare_arms`.

Every simulated figure is a level, plus the luck of the seed, which all arms share and which is far larger than what is
looked for, plus noise of its own. Legend: `R` repetitions, `A` arms with the baseline first, `S` seeds.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest

from hydra.compare import Comparison, Verdict, compare_arms
from hydra.compare.arms import ArmResult

N_REPETITIONS = 1000
NOISE = 0.01
SEED_LUCK = 0.3
# Half of the noise is in either arm's figure.
SPREAD = NOISE * 2**0.5
NAMES = ["baseline", *(f"arm {i}" for i in range(1, 11))]

Sampler = Callable[..., np.ndarray]


def normal(rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(size)


def heavy(rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    return rng.standard_t(5, size) / (5 / 3) ** 0.5


def simulate(seed: int, n_arms: int, n_seeds: int, sampler: Sampler = normal) -> np.ndarray:
    rng = np.random.default_rng(seed)
    luck_R1S = SEED_LUCK * rng.standard_normal((N_REPETITIONS, 1, n_seeds))
    return 3.0 + luck_R1S + NOISE * sampler(rng, (N_REPETITIONS, n_arms + 1, n_seeds))


def compared(figures_RAS: np.ndarray) -> list[Comparison]:
    """The baseline's seeds come in another order than the arms': figures must find each other by seed."""
    seeds = range(100, 100 + figures_RAS.shape[2])
    seconds = dict.fromkeys(seeds, 60.0)
    comparisons = []
    for figures_AS in figures_RAS.tolist():
        by_seed = [dict(zip(seeds, figures_S, strict=True)) for figures_S in figures_AS]
        by_seed[0] = dict(reversed(by_seed[0].items()))
        arms = [ArmResult(name, figures, seconds) for name, figures in zip(NAMES, by_seed, strict=False)]
        comparisons.append(compare_arms(arms, "baseline"))
    return comparisons


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def sampling_error(chance: float) -> float:
    """Three standard errors of a share of the repetitions."""
    return 3 * (chance * (1 - chance) / N_REPETITIONS) ** 0.5


@lru_cache
def equal_arms(n_arms: int, n_seeds: int, sampler: Sampler = normal) -> list[Comparison]:
    return compared(simulate(n_arms + 10 * n_seeds, n_arms, n_seeds, sampler))


@pytest.mark.parametrize(
    ("n_arms", "n_seeds", "sampler"),
    [
        *((n_arms, n_seeds, normal) for n_arms in (1, 10) for n_seeds in (3, 5, 8)),
        *((1, n_seeds, heavy) for n_seeds in (3, 5, 8)),
        (10, 5, heavy),
    ],
)
def test_few_comparisons_of_equal_arms_get_a_verdict(n_arms: int, n_seeds: int, sampler: Sampler) -> None:
    """Two arms in all, and ten beside the baseline. Normal noise is the claim; heavy tails are what life does."""
    comparisons = equal_arms(n_arms, n_seeds, sampler)
    alarms = share([any(arm.verdict is not Verdict.UNDECIDED for arm in c.arms) for c in comparisons])
    assert alarms <= 0.05 + sampling_error(0.05)
    if n_arms == 1 and sampler is normal:
        assert alarms >= 0.05 - sampling_error(0.05), "the test is exact: fewer alarms are sensitivity thrown away"
        sides = [c.arms[0].verdict is Verdict.BETTER for c in comparisons if c.arms[0].verdict is not Verdict.UNDECIDED]
        assert 0.2 < share(sides) < 0.8


@pytest.mark.parametrize("n_seeds", [3, 5, 8])
@pytest.mark.parametrize("n_arms", [1, 10])
def test_intervals_cover_the_true_difference_each_and_all_at_once(n_arms: int, n_seeds: int) -> None:
    comparisons = equal_arms(n_arms, n_seeds)
    first = share([c.arms[0].interval.low <= 0 <= c.arms[0].interval.high for c in comparisons])
    assert first == pytest.approx(0.95, abs=sampling_error(0.95))
    every = share(
        [all(a.simultaneous_interval.low <= 0 <= a.simultaneous_interval.high for a in c.arms) for c in comparisons]
    )
    assert every >= 0.95 - sampling_error(0.95)


@pytest.mark.parametrize("n_seeds", [3, 5, 8])
@pytest.mark.parametrize("n_arms", [1, 10])
def test_an_effect_of_the_stated_detectable_size_is_found(n_arms: int, n_seeds: int) -> None:
    """Each repetition states its size from one comparison, and the effect is planted into another with new noise."""
    stated_R = np.array([c.arms[0].detectable_effect for c in equal_arms(n_arms, n_seeds)])
    side_R = np.resize([-1, 1], N_REPETITIONS)
    figures_RAS = simulate(3000 + n_arms + 10 * n_seeds, n_arms, n_seeds)
    figures_RAS[:, 1] += (side_R * stated_R)[:, None]
    wanted = {-1: Verdict.BETTER, 1: Verdict.WORSE}
    found = share([c.arms[0].verdict is wanted[side] for c, side in zip(compared(figures_RAS), side_R, strict=True)])
    assert found >= 0.8 - sampling_error(0.8)
    if n_arms == 1:
        assert found <= 0.8 + sampling_error(0.8), "a smaller effect would be found too"


@pytest.mark.parametrize(("n_arms", "n_seeds"), [(1, 3), (1, 8), (10, 5)])
def test_it_is_found_also_if_the_size_is_stated_from_the_true_spread(n_arms: int, n_seeds: int) -> None:
    arm = equal_arms(n_arms, n_seeds)[0].arms[0]
    figures_RAS = simulate(4000 + n_arms + 10 * n_seeds, n_arms, n_seeds)
    figures_RAS[:, 1] += arm.detectable_effect / arm.spread * SPREAD
    assert share([c.arms[0].verdict is Verdict.WORSE for c in compared(figures_RAS)]) >= 0.8 - sampling_error(0.8)


@pytest.mark.parametrize("n_seeds", [3, 5])
def test_the_stated_number_of_seeds_decides_an_effect_of_the_observed_size(n_seeds: int) -> None:
    """As a pilot: its noise sets the spread, and its observed effect is made the true one."""
    rng = np.random.default_rng(5000 + n_seeds)
    found = []
    for comparison in equal_arms(1, n_seeds):
        arm = comparison.arms[0]
        if arm.seeds_to_decide is None or arm.seeds_to_decide > 200:
            continue
        pilot = arm.spread * (n_seeds - 1) ** 0.5 / rng.chisquare(n_seeds - 1) ** 0.5
        differences = arm.mean_difference + pilot * rng.standard_normal(arm.seeds_to_decide)
        seeds = range(arm.seeds_to_decide)
        seconds = dict.fromkeys(seeds, 60.0)
        arms = [ArmResult("baseline", dict.fromkeys(seeds, 3.0), seconds)]
        arms.append(ArmResult("arm 1", dict(zip(seeds, 3.0 + differences, strict=True)), seconds))
        found.append(compare_arms(arms, "baseline").arms[0].verdict is not Verdict.UNDECIDED)
    assert len(found) > 100
    assert share(found) == pytest.approx(0.8, abs=3 * (0.16 / len(found)) ** 0.5)

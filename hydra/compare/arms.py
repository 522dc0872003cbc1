"""Comparing arms with a baseline, paired by seed.

Two runs of one seed share data order and as much of the initialisation as their shapes allow, so the luck of the seed
is in both figures and leaves with their difference; what is tested is the mean of the differences. The choices:

- Verdicts by Holm's corrected p-values: they hold the chance of any false verdict among all arms, and decide whatever
  Bonferroni's would. Holm's procedure has no two-sided intervals of its own that say more than the verdict, so the
  intervals beside them are Bonferroni's, which hold all arms at once. Where Holm decides and that interval still
  touches zero, which is rare, the sentence says so.
- No verdict on fewer than three seeds. Two leave one degree of freedom: the spread is then known from a single number,
  and two differences that are close by accident, or rounded, look like a certainty.
- No verdict without a spread. A difference that is the same for every seed is a seed that did not reach the run, or
  rounded figures, more often than a law of nature.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from hydra.compare import paired
from hydra.compare.results import MIN_SEEDS, ArmComparison, Comparison, Interval, Verdict
from hydra.errors import ComparisonError

# Rounding of doubles in a difference of figures, with room; the spread of real runs is many orders above it.
ROUNDING = 1e-13


@dataclass(frozen=True)
class ArmResult:
    """One figure per seed, for example validation bits per byte, and the seconds that each of the runs took.

    Raises ComparisonError when there is no figure, one is not finite, or the seconds are not those of the same seeds.
    """

    name: str
    figures: Mapping[int, float]
    seconds: Mapping[int, float]

    def __post_init__(self) -> None:
        if not self.figures:
            raise ComparisonError(f"arm {self.name!r} must have a figure for each seed, but got none; run it first")
        for seed, figure in self.figures.items():
            if not math.isfinite(figure):
                raise ComparisonError(
                    f"figures must be finite, but arm {self.name!r} got {figure} for seed {seed}; mend that run (a"
                    " smaller learning rate?), or leave the arm out and report that it diverged"
                )
        if self.seconds.keys() != self.figures.keys():
            raise ComparisonError(
                f"seconds must be given for the seeds of the figures, but arm {self.name!r} got seconds for"
                f" {sorted(self.seconds)} and figures for {sorted(self.figures)}; give both for each run"
            )
        for seed, seconds in self.seconds.items():
            if not (math.isfinite(seconds) and seconds > 0):
                raise ComparisonError(
                    f"seconds must be positive, but arm {self.name!r} got {seconds} for seed {seed}; give the run's own"
                )

    @property
    def seconds_per_run(self) -> float:
        """The mean over the seeds."""
        return fmean(self.seconds.values())


def compare_arms(
    arms: Sequence[ArmResult],
    baseline: str,
    *,
    confidence: float = 0.95,
    larger_is_better: bool = False,
    unit: str = "",
) -> Comparison:
    """Compare every arm with the one called `baseline`; `unit` is that of the figures, for the sentences.

    Among all arms, the chance that any that does not differ gets a verdict of better or worse is at most
    1 - confidence; a report that compares in several ways makes that promise once for each. Choose the number of seeds
    beforehand: adding seeds until a verdict appears voids it.
    Raises ComparisonError when names are not distinct, the baseline or every other arm is missing, or an arm lacks a
    seed of another.
    """
    base, others = _split(arms, baseline)
    if not 0.5 <= confidence < 1:
        raise ComparisonError(f"confidence must be from 0.5 to below 1, but got {confidence}; give 0.95 for 95 %")
    seeds = _common_seeds(arms)
    level = 1 - confidence
    pairs = [_Paired(arm, base, seeds) for arm in others]
    corrected = paired.holm([1.0 if pair.p_value is None else pair.p_value for pair in pairs])
    compared = tuple(
        _compare_one(pair, p, level, len(others), base.seconds_per_run, larger_is_better)
        for pair, p in zip(pairs, corrected, strict=True)
    )
    return Comparison(baseline, unit, confidence, larger_is_better, seeds, base.seconds_per_run, compared)


class _Paired:
    """The differences of one arm, and their test as long as they have a spread."""

    def __init__(self, arm: ArmResult, base: ArmResult, seeds: Sequence[int]) -> None:
        self.arm = arm
        self.differences = {seed: float(arm.figures[seed] - base.figures[seed]) for seed in seeds}
        self.mean = fmean(self.differences.values())
        self.spread: float | None = None
        self.p_value: float | None = None
        if len(seeds) > 1:
            spread = paired.spread_of(list(self.differences.values()))
            largest = max(abs(result.figures[seed]) for result in (arm, base) for seed in seeds)
            if spread > ROUNDING * largest:
                self.spread = spread
                self.p_value = paired.t_test(self.mean, spread, len(seeds))


def _compare_one(
    pair: _Paired, corrected_p: float, level: float, n_arms: int, base_seconds: float, larger_is_better: bool
) -> ArmComparison:
    n_seeds = len(pair.differences)
    corrected_level = level / n_arms
    verdict = Verdict.UNDECIDED
    if pair.spread is not None and n_seeds >= MIN_SEEDS and corrected_p <= level:
        verdict = Verdict.BETTER if (pair.mean > 0) == larger_is_better else Verdict.WORSE
    n_decide: int | None = None
    if n_seeds < MIN_SEEDS:
        n_decide = MIN_SEEDS
    elif pair.spread is not None and verdict is Verdict.UNDECIDED:
        n_decide = paired.seeds_to_decide(abs(pair.mean) / pair.spread, n_seeds, corrected_level)
    hours = None if n_decide is None else (n_decide - n_seeds) * (pair.arm.seconds_per_run + base_seconds) / 3600
    interval = simultaneous = detectable = None
    if pair.spread is not None:
        interval = Interval(*paired.t_interval(pair.mean, pair.spread, n_seeds, level))
        simultaneous = Interval(*paired.t_interval(pair.mean, pair.spread, n_seeds, corrected_level))
        detectable = pair.spread * paired.detectable_in_spreads(n_seeds, n_seeds - 1, corrected_level)
    return ArmComparison(
        name=pair.arm.name,
        differences=pair.differences,
        mean_difference=pair.mean,
        verdict=verdict,
        spread=pair.spread,
        interval=interval,
        simultaneous_interval=simultaneous,
        p_value=pair.p_value,
        corrected_p_value=None if pair.p_value is None else corrected_p,
        detectable_effect=detectable,
        seeds_to_decide=n_decide,
        hours_to_decide=hours,
        seconds_per_run=pair.arm.seconds_per_run,
    )


def _split(arms: Sequence[ArmResult], baseline: str) -> tuple[ArmResult, list[ArmResult]]:
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ComparisonError(f"names of arms must be distinct, but got {names}; rename or drop one")
    if baseline not in names:
        raise ComparisonError(f"the baseline must be one of {names}, but got {baseline!r}; name one, or add its runs")
    others = [arm for arm in arms if arm.name != baseline]
    if not others:
        raise ComparisonError(
            f"arms must hold one beside the baseline, but got only {baseline!r}; add the arm to compare"
        )
    return next(arm for arm in arms if arm.name == baseline), others


def _common_seeds(arms: Sequence[ArmResult]) -> tuple[int, ...]:
    """The seeds, the same for all arms: to drop the pairs of a failed run would favour the arm that fails."""
    seeds = sorted(set().union(*(arm.figures for arm in arms)))
    missing = {arm.name: [seed for seed in seeds if seed not in arm.figures] for arm in arms}
    lacking = {name: absent for name, absent in missing.items() if absent}
    if lacking:
        named = "; ".join(f"{name!r} lacks seeds {absent}" for name, absent in lacking.items())
        raise ComparisonError(
            f"every arm must have a figure for the same seeds, but got: {named}; run them, or leave them out for all"
        )
    return tuple(seeds)

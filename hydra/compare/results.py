"""What a comparison found, as data for JSON and as sentences for a report."""

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from hydra.compare.paired import POWER, SEEDS_LIMIT

MIN_SEEDS = 3


class Verdict(StrEnum):
    """What can be said about an arm and the baseline."""

    BETTER = "better"
    WORSE = "worse"
    UNDECIDED = "undecided"


class Interval(NamedTuple):
    """From `low` to `high`, in the unit of the figures."""

    low: float
    high: float


@dataclass(frozen=True)
class ArmComparison:
    """One arm against the baseline; differences are arm minus baseline, in the unit of the figures.

    interval: misses the true difference of this arm with a chance of 1 - confidence.
    simultaneous_interval: the same for all arms at once (Bonferroni): the chance that any of them misses.
    p_value, corrected_p_value: of the paired t test, alone and by Holm over all arms. The verdict follows the second.
    spread: sample standard deviation of the differences.
    detectable_effect: found in 80 % of comparisons like this one, at the corrected level (see `paired`).
    seeds_to_decide: when undecided, the total number of seeds that would find a difference of the observed size in
        80 % of cases; with fewer than three seeds, three. None: no number below 1,000, no spread, or decided already.
    hours_to_decide: of the further runs of this arm and of the baseline, one after the other.
    Without a spread (one seed, or a difference that is the same for every seed) there is no interval, test or effect.
    """

    name: str
    differences: dict[int, float]
    mean_difference: float
    verdict: Verdict
    spread: float | None
    interval: Interval | None
    simultaneous_interval: Interval | None
    p_value: float | None
    corrected_p_value: float | None
    detectable_effect: float | None
    seeds_to_decide: int | None
    hours_to_decide: float | None
    seconds_per_run: float


@dataclass(frozen=True)
class Comparison:
    """All arms against one baseline on the same seeds; `arms` in the order given, without the baseline."""

    baseline: str
    unit: str
    confidence: float
    larger_is_better: bool
    seeds: tuple[int, ...]
    baseline_seconds_per_run: float
    arms: tuple[ArmComparison, ...]

    def arm(self, name: str) -> ArmComparison:
        """The comparison of one arm, by name; KeyError if there is none."""
        return {arm.name: arm for arm in self.arms}[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain types that `json.dumps` takes, with each arm's sentence."""
        arms = [{**asdict(arm), "verdict": arm.verdict.value, "sentence": self.sentence(arm)} for arm in self.arms]
        return {**asdict(self), "seeds": list(self.seeds), "arms": arms}

    def sentences(self) -> list[str]:
        """One for each arm, in their order."""
        return [self.sentence(arm) for arm in self.arms]

    def sentence(self, arm: ArmComparison) -> str:
        """The verdict on an arm in plain words, with its simultaneous interval."""
        if arm.simultaneous_interval is None or len(self.seeds) < MIN_SEEDS:
            return self._sentence_without_test(arm)
        if arm.verdict is Verdict.UNDECIDED:
            return self._sentence_undecided(arm, arm.simultaneous_interval)
        sign = math.copysign(1.0, arm.mean_difference)
        low, high = sorted(sign * bound for bound in arm.simultaneous_interval)
        decimals = _decimals(high - low)
        said = (
            f"{arm.name} is {arm.verdict} than {self.baseline} by {self._amount(abs(arm.mean_difference), decimals)}"
            f" ({self._basis(low, high, decimals)})"
        )
        if low <= 0:
            said += (
                f"; the interval for all arms at once touches 0, and Holm's sharper test decides"
                f" (corrected p = {arm.corrected_p_value:.2g})"
            )
        return said + "."

    def _sentence_without_test(self, arm: ArmComparison) -> str:
        n_seeds = len(self.seeds)
        difference = f"{arm.mean_difference:.4g} {self.unit}".strip()
        head = f"{arm.name} against {self.baseline} is undecided: "
        if n_seeds < MIN_SEEDS:
            return (
                f"{head}a verdict needs at least {MIN_SEEDS} seeds, and there are {n_seeds} (difference {difference});"
                f" {self._cost(arm)}."
            )
        return (
            f"{head}the difference is {difference} for each of the {n_seeds} seeds, so its spread is not known; check"
            " that the seed reaches the run and that the figures are not rounded."
        )

    def _sentence_undecided(self, arm: ArmComparison, interval: Interval) -> str:
        decimals = _decimals(interval.high - interval.low)
        assert arm.detectable_effect is not None
        detectable = self._amount(arm.detectable_effect, decimals)
        return (
            f"{arm.name} against {self.baseline} is undecided: the difference is"
            f" {self._amount(arm.mean_difference, decimals)} ({self._basis(*interval, decimals)});"
            f" {len(self.seeds)} seeds find an effect of {detectable} in {100 * POWER:.0f} % of cases;"
            f" {self._cost(arm)}."
        )

    def _amount(self, value: float, decimals: int) -> str:
        return f"{value:.{decimals}f} {self.unit}".strip()

    def _basis(self, low: float, high: float, decimals: int) -> str:
        corrected = f", corrected for {len(self.arms)} arms" if len(self.arms) > 1 else ""
        interval = f"{100 * self.confidence:g} % interval {low:.{decimals}f} to {high:.{decimals}f}"
        return f"{interval}{corrected}, {len(self.seeds)} seeds"

    def _cost(self, arm: ArmComparison) -> str:
        if arm.seeds_to_decide is None:
            return f"no number of seeds below {SEEDS_LIMIT:,} would decide a difference of this size"
        assert arm.hours_to_decide is not None
        n_more = arm.seeds_to_decide - len(self.seeds)
        decide = f"{arm.seeds_to_decide} seeds would decide a difference of this size"
        if len(self.seeds) < MIN_SEEDS:
            decide = f"{arm.seeds_to_decide} seeds are the least"
        duration = f"{arm.hours_to_decide:,.0f}" if arm.hours_to_decide >= 10 else f"{arm.hours_to_decide:.2g}"
        return f"{decide}: {n_more} more {'run' if n_more == 1 else 'runs'} of each of the two, {duration} hours"


def _decimals(width: float) -> int:
    """As many as show two digits of half an interval's width."""
    return max(0, 1 - math.floor(math.log10(width / 2)))

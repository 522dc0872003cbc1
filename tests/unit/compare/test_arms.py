"""What goes in, what is refused, and what is said."""

import json
import math
import random

import pytest
from scipy import stats

from hydra.compare import ArmComparison, ArmResult, Comparison, Verdict, compare_arms
from hydra.errors import ComparisonError

SEEDS = (11, 12, 13, 14, 15)
GQA = (3.10, 3.14, 3.02, 3.21, 3.08)
BETTER = (-0.011, -0.013, -0.012, -0.014, -0.010)
WORSE = tuple(-x for x in BETTER)
UNCLEAR = (0.004, -0.009, 0.012, -0.001, 0.007)
BARELY = tuple(-0.0138 + x for x in UNCLEAR)


def result(name: str, figures: tuple[float, ...], seconds: float = 100.0, seeds: tuple[int, ...] = SEEDS) -> ArmResult:
    return ArmResult(name, dict(zip(seeds, figures, strict=True)), dict.fromkeys(seeds, seconds))


def shifted(name: str, by: tuple[float, ...], seconds: float = 100.0) -> ArmResult:
    n = len(by)
    return result(name, tuple(b + x for b, x in zip(GQA[:n], by, strict=True)), seconds, SEEDS[:n])


def against_gqa(*arms: ArmResult, **options: object) -> Comparison:
    n = len(arms[0].figures)
    return compare_arms([result("gqa", GQA[:n], 80.0, SEEDS[:n]), *arms], "gqa", **options)


def only(comparison: Comparison) -> ArmComparison:
    (arm,) = comparison.arms
    return arm


def test_verdicts_and_the_sign_of_the_difference() -> None:
    comparison = against_gqa(shifted("ccgqa", BETTER), shifted("mla", WORSE), shifted("lightning", UNCLEAR))
    assert [(arm.name, arm.verdict) for arm in comparison.arms] == [
        ("ccgqa", Verdict.BETTER),
        ("mla", Verdict.WORSE),
        ("lightning", Verdict.UNDECIDED),
    ]
    arm = comparison.arm("ccgqa")
    assert arm.mean_difference == pytest.approx(-0.012)
    assert arm.interval is not None and arm.interval.low < -0.012 < arm.interval.high < 0


def test_larger_may_be_better() -> None:
    comparison = against_gqa(shifted("ccgqa", BETTER), shifted("mla", WORSE), larger_is_better=True)
    assert [arm.verdict for arm in comparison.arms] == [Verdict.WORSE, Verdict.BETTER]
    assert comparison.arms[0].mean_difference == pytest.approx(-0.012)
    assert comparison.larger_is_better


def test_figures_pair_by_seed_and_not_by_position() -> None:
    straight = against_gqa(shifted("ccgqa", BETTER))
    arm = shifted("ccgqa", BETTER)
    seeds = list(SEEDS)
    random.Random(0).shuffle(seeds)
    shuffled = ArmResult("ccgqa", {seed: arm.figures[seed] for seed in seeds}, arm.seconds)
    assert against_gqa(shuffled) == straight
    assert only(straight).differences == pytest.approx(dict(zip(SEEDS, BETTER, strict=True)))


def test_numbers_of_one_arm_are_those_of_scipy() -> None:
    arm = only(against_gqa(shifted("lightning", UNCLEAR), confidence=0.9))
    expected = stats.ttest_rel([b + x for b, x in zip(GQA, UNCLEAR, strict=True)], GQA)
    assert arm.p_value == pytest.approx(expected.pvalue)
    assert arm.corrected_p_value == arm.p_value
    assert arm.interval == pytest.approx(tuple(expected.confidence_interval(0.9)))
    assert arm.simultaneous_interval == arm.interval
    assert arm.spread == pytest.approx(stats.tstd(UNCLEAR))


def test_several_arms_are_corrected_for_and_the_plain_interval_is_not() -> None:
    lone = only(against_gqa(shifted("lightning", UNCLEAR)))
    comparison = against_gqa(shifted("lightning", UNCLEAR), shifted("mla", WORSE), shifted("ccgqa", BETTER))
    arm = comparison.arm("lightning")
    assert arm.interval == lone.interval
    assert arm.p_value == lone.p_value
    figures = [b + x for b, x in zip(GQA, UNCLEAR, strict=True)]
    bonferroni = stats.ttest_rel(figures, GQA).confidence_interval(1 - 0.05 / 3)
    assert arm.simultaneous_interval == pytest.approx(tuple(bonferroni))
    assert comparison.arm("mla").corrected_p_value == pytest.approx(3 * comparison.arm("mla").p_value)
    assert arm.detectable_effect > 1.3 * lone.detectable_effect
    assert arm.seeds_to_decide is None or arm.seeds_to_decide > lone.seeds_to_decide


def test_an_arm_is_not_decided_by_its_plain_p_value() -> None:
    assert only(against_gqa(shifted("ccgqa", BARELY))).verdict is Verdict.BETTER
    comparison = against_gqa(shifted("ccgqa", BARELY), shifted("mla", UNCLEAR), shifted("lightning", UNCLEAR[::-1]))
    assert comparison.arm("ccgqa").verdict is Verdict.UNDECIDED
    assert comparison.arm("ccgqa").p_value < 0.05


def test_holm_may_decide_where_the_simultaneous_interval_touches_zero_and_the_sentence_says_so() -> None:
    comparison = against_gqa(shifted("mla", BETTER), shifted("ccgqa", BARELY), unit="nats")
    arm = comparison.arm("ccgqa")
    assert arm.verdict is Verdict.BETTER
    assert arm.simultaneous_interval.high > 0 > arm.interval.high
    assert "Holm's sharper test decides (corrected p = 0.0" in comparison.sentence(arm)
    assert "Holm" not in comparison.sentence(comparison.arm("mla"))


def test_two_seeds_give_no_verdict_and_say_what_does() -> None:
    comparison = against_gqa(shifted("ccgqa", BETTER[:2]), unit="nats")
    sure = against_gqa(shifted("ccgqa", (-0.5, -0.500001)), unit="nats")
    for case in (comparison, sure):
        arm = only(case)
        assert arm.verdict is Verdict.UNDECIDED
        assert arm.interval is not None
        assert arm.seeds_to_decide == 3
        assert arm.hours_to_decide == pytest.approx(180 / 3600)
    assert only(sure).p_value < 0.001
    assert comparison.sentences() == [
        "ccgqa against gqa is undecided: a verdict needs at least 3 seeds, and there are 2 (difference -0.012 nats);"
        " 3 seeds are the least: 1 more run of each of the two, 0.05 hours."
    ]
    assert only(against_gqa(shifted("ccgqa", BETTER[:3]))).verdict is Verdict.BETTER


def test_one_seed_has_a_difference_and_nothing_else() -> None:
    comparison = against_gqa(shifted("ccgqa", BETTER[:1]))
    arm = only(comparison)
    assert arm.mean_difference == pytest.approx(-0.011)
    assert (arm.interval, arm.p_value, arm.corrected_p_value, arm.spread, arm.detectable_effect) == (None,) * 5
    assert arm.seeds_to_decide == 3
    assert arm.hours_to_decide == pytest.approx(2 * 180 / 3600)
    assert "at least 3 seeds" in comparison.sentence(arm)


@pytest.mark.parametrize("by", [0.0, -0.1, 1e-9])
def test_a_difference_without_spread_is_undecided_and_questioned(by: float) -> None:
    """-0.1 leaves differences that rounding makes unequal: a t of 10^15 must not come of it."""
    wide = (0.4, 0.9, 1.3, 2.2, 5.1)
    figures = {"gqa": wide, "ccgqa": tuple(x + by for x in wide), "mla": tuple(map(sum, zip(wide, BETTER)))}
    comparison = compare_arms([result(name, of_arm) for name, of_arm in figures.items()], "gqa")
    arm = comparison.arm("ccgqa")
    assert arm.verdict is Verdict.UNDECIDED
    assert (arm.interval, arm.p_value, arm.detectable_effect, arm.seeds_to_decide) == (None,) * 4
    assert "check that the seed reaches the run" in comparison.sentence(arm)
    assert comparison.arm("mla").corrected_p_value == pytest.approx(2 * comparison.arm("mla").p_value)
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_seeds_and_hours_that_would_decide() -> None:
    arm = only(against_gqa(shifted("lightning", UNCLEAR, seconds=100.0)))
    assert arm.seeds_to_decide is not None and arm.seeds_to_decide > 5
    assert arm.hours_to_decide == pytest.approx((arm.seeds_to_decide - 5) * (100 + 80) / 3600)
    assert arm.seconds_per_run == 100
    decided = only(against_gqa(shifted("ccgqa", BETTER)))
    assert (decided.seeds_to_decide, decided.hours_to_decide) == (None, None)
    assert decided.detectable_effect is not None


def test_seconds_are_averaged_over_the_seeds() -> None:
    arm = shifted("lightning", UNCLEAR)
    uneven = ArmResult("lightning", arm.figures, dict(zip(SEEDS, (50.0, 50.0, 50.0, 50.0, 300.0), strict=True)))
    assert against_gqa(uneven).arms == against_gqa(arm).arms


def test_an_undecided_arm_needs_more_seeds_and_its_effect_is_below_the_detectable_one() -> None:
    rng = random.Random(1)
    for _ in range(50):
        arm = only(against_gqa(shifted("x", tuple(rng.gauss(0.01, 0.02) for _ in SEEDS))))
        if arm.verdict is Verdict.UNDECIDED:
            assert abs(arm.mean_difference) < arm.detectable_effect
            assert arm.seeds_to_decide is None or arm.seeds_to_decide > len(SEEDS)


def test_sentence_of_a_decided_arm() -> None:
    arms = [shifted("ccgqa", BETTER), shifted("mla", WORSE)]
    better, worse = against_gqa(*arms, unit="bits per byte").sentences()
    numbers = "by 0.0120 bits per byte (95 % interval 0.0095 to 0.0145, corrected for 2 arms, 5 seeds)."
    assert better == f"ccgqa is better than gqa {numbers}"
    assert worse == f"mla is worse than gqa {numbers}"
    (lone,) = against_gqa(arms[0], confidence=0.99).sentences()
    assert lone == "ccgqa is better than gqa by 0.0120 (99 % interval 0.0087 to 0.0153, 5 seeds)."


def test_sentence_of_an_undecided_arm() -> None:
    comparison = against_gqa(shifted("lightning", UNCLEAR, seconds=3500), unit="nats")
    assert comparison.sentences() == [
        "lightning against gqa is undecided: the difference is 0.0026 nats (95 % interval -0.0074 to 0.0126, 5 seeds);"
        " 5 seeds find an effect of 0.0168 nats in 80 % of cases;"
        " 119 seeds would decide a difference of this size: 114 more runs of each of the two, 113 hours."
    ]
    nothing = against_gqa(shifted("lightning", (0.01, -0.01, 0.02, -0.02, 0.0001)))
    assert only(nothing).seeds_to_decide is None
    assert "no number of seeds below 1,000 would decide a difference of this size" in nothing.sentences()[0]


def test_to_dict_is_json_with_sentences() -> None:
    comparison = against_gqa(shifted("ccgqa", BETTER), shifted("lightning", UNCLEAR), unit="nats")
    loaded = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert loaded["baseline"] == "gqa" and loaded["unit"] == "nats" and loaded["seeds"] == list(SEEDS)
    assert loaded["baseline_seconds_per_run"] == 80
    first, second = loaded["arms"]
    assert first["verdict"] == "better" and first["sentence"] == comparison.sentences()[0]
    assert first["differences"]["12"] == pytest.approx(-0.013)
    assert second["hours_to_decide"] == comparison.arms[1].hours_to_decide
    assert first["simultaneous_interval"] == pytest.approx(list(comparison.arms[0].simultaneous_interval))


def test_a_missing_seed_is_refused_by_name() -> None:
    short = result("mla", GQA[:4], seeds=SEEDS[:4])
    with pytest.raises(ComparisonError, match=r"'mla' lacks seeds \[15\]; run them"):
        against_gqa(shifted("ccgqa", BETTER), short)
    with pytest.raises(ComparisonError, match=r"'gqa' lacks seeds \[15\]"):
        compare_arms([result("gqa", GQA[:4], seeds=SEEDS[:4]), shifted("ccgqa", BETTER)], "gqa")
    other_seeds = result("mla", GQA, seeds=(21, 22, 23, 24, 25))
    with pytest.raises(ComparisonError, match="'mla' lacks seeds"):
        against_gqa(shifted("ccgqa", BETTER), other_seeds)


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_is_refused(figure: float) -> None:
    with pytest.raises(ComparisonError, match=r"arm 'mla' got .* for seed 12; mend that run"):
        ArmResult("mla", {11: 3.0, 12: figure}, {11: 1.0, 12: 1.0})


@pytest.mark.parametrize("seconds", [{11: 1.0}, {11: 1.0, 12: 0.0}, {11: 1.0, 12: math.nan}, {11: 1.0, 12: -3.0}])
def test_seconds_that_cannot_be_are_refused(seconds: dict[int, float]) -> None:
    with pytest.raises(ComparisonError, match="arm 'mla' got"):
        ArmResult("mla", {11: 3.0, 12: 3.1}, seconds)


def test_arms_that_cannot_be_compared_are_refused() -> None:
    gqa, mla = result("gqa", GQA), shifted("mla", WORSE)
    with pytest.raises(ComparisonError, match="none; run it first"):
        ArmResult("mla", {}, {})
    with pytest.raises(ComparisonError, match=r"baseline must be one of .*but got 'mha'"):
        compare_arms([gqa, mla], "mha")
    with pytest.raises(ComparisonError, match="distinct"):
        compare_arms([gqa, mla, mla], "gqa")
    with pytest.raises(ComparisonError, match="only 'gqa'"):
        compare_arms([gqa], "gqa")
    for confidence in (1.0, 95.0, 0.05, math.nan):
        with pytest.raises(ComparisonError, match="confidence"):
            compare_arms([gqa, mla], "gqa", confidence=confidence)

"""The arms of a comparison made equal: widths solved for, and what each then has in parameters, FLOPs and cache.

Parameters and FLOPs are straight lines in the width of the feed-forward layer, so that two models without memory give
the width; the cache is set by one option of each backend, for which the values that there are get tried.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from hydra.attention.plan import parse_plan
from hydra.compare.results import MIN_SEEDS
from hydra.errors import ConfigError
from hydra.model.framework import HydraModel
from scripts.comparison import ComparisonConfig
from scripts.config import TrainingConfig

CACHE_OPTIONS = {"gqa": "n_kv_heads", "ccgqa": "n_kv_heads", "mla": "kv_latent_width"}
"""The option of each backend that sets what its cache holds of a token."""
CACHE_TOLERANCE = 0.1
"""How far, as a share, an arm's cache may be from what is asked for and still be called equal."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One attention in one comparison, with the config of its runs and what a model of it has."""

    name: str
    """As it was asked for."""
    attention: str
    """As it is trained: with the option that makes caches equal."""
    config: TrainingConfig
    n_parameters: int
    forward_flops: int
    """Of one row of context_length tokens, as its layers count them: causal pairs; for lightning all pairs of a chunk;
    for a class of one's own what torch's operators do, fitted."""
    cache_bytes: int
    """Of one row of context_length tokens, by formula, with numbers of 2 bytes (states keep their own dtype)."""

    @property
    def label(self) -> str:
        """Its name in verdicts: as it was asked for, unless an option that was fixed there had to be another."""
        asked, trained = parse_plan(self.name), parse_plan(self.attention)
        fixed = {name: CACHE_OPTIONS[name] for name, options in asked if CACHE_OPTIONS.get(name) in options}
        changed = [
            before[fixed[name]] != after[fixed[name]]
            for (name, before), (_, after) in zip(asked, trained, strict=True)
            if name in fixed and fixed[name] in before
        ]
        return f"{self.attention} in place of {self.name}" if any(changed) else self.name

    def to_dict(self) -> dict[str, Any]:
        """What a report shows of it."""
        return {
            "name": self.name,
            "attention": self.attention,
            "d_feed_forward": self.config.d_feed_forward,
            "n_parameters": self.n_parameters,
            "forward_flops": self.forward_flops,
            "cache_bytes": self.cache_bytes,
        }


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """An attention that cannot be made equal in what is asked for, and why."""

    name: str
    reason: str


def build_all_arms(config: ComparisonConfig) -> dict[str, tuple[list[Arm], list[LeftOut]]]:
    """For each thing that is made equal, what `build_arms` gives; the baseline alone where no arm can be made equal.

    Raises:
        ConfigError: no arm can be made equal to the baseline in anything, or the baseline has no cache to solve for.
    """
    found: dict[str, tuple[list[Arm], list[LeftOut]]] = {equal: build_arms(config, equal) for equal in config.equal}
    if all(len(arms) == 1 for arms, _ in found.values()):
        raise ConfigError(
            f"an arm must be there to compare {config.baseline} with, but none can be made equal to it:\n"
            + "\n".join(describe_left_out(found))
        )
    return found


def describe_left_out(found: Mapping[str, tuple[list[Arm], list[LeftOut]]]) -> list[str]:
    """A sentence for each arm that is left out of a comparison, and for each comparison that nothing is left of."""
    lines = []
    for equal, (arms, left_out) in found.items():
        what = equal.replace("_", " ")
        lines += [f"left out at equal {what}: {one.name}, because {one.reason}" for one in left_out]
        if len(arms) == 1:
            lines.append(f"nothing is trained at equal {what}: no arm is left")
    return lines


def describe_shortcomings(config: ComparisonConfig, found: Mapping[str, tuple[list[Arm], list[LeftOut]]]) -> list[str]:
    """What is known before the first run that the comparison will not tell, a sentence each."""
    few = f"no verdict will be given: that needs at least {MIN_SEEDS} seeds, and n_seeds is {config.n_seeds}"
    return [*([few] if config.n_seeds < MIN_SEEDS else []), *describe_left_out(found)]


def count_runs(config: ComparisonConfig, found: Mapping[str, tuple[list[Arm], list[LeftOut]]]) -> int:
    """Runs of the comparison; those that two comparisons share are counted in both, and trained once."""
    n_arms = sum(len(arms) for arms, _ in found.values() if len(arms) > 1)
    return n_arms * (len(config.learning_rate_factors) + config.n_seeds)


def build_arms(config: ComparisonConfig, equal: str) -> tuple[list[Arm], list[LeftOut]]:
    """The baseline and every arm that can be made equal to it in `equal`; those that cannot, or become another's twin.

    Raises:
        ConfigError: the baseline itself has no cache of the size that is asked for.
    """
    baseline, arms, left_out = config.baseline, [], []
    base = measure(config.training_config(baseline), baseline, baseline)
    if equal == "kv_bytes":
        try:
            attention = solve_cache(config, baseline, round(config.kv_share * base.cache_bytes))
        except ConfigError as error:
            raise ConfigError(
                f"baseline {baseline} cannot be given kv_share={config.kv_share:g} of its cache: {error}; give another "
                "baseline or kv_share, or leave kv_bytes out of equal"
            ) from None
        base = solve_feed_forward(config, baseline, attention, "parameters", base.n_parameters)
    arms.append(base)
    target = base.forward_flops if equal == "flops" else base.n_parameters
    for name in config.arms:
        try:
            attention = solve_cache(config, name, base.cache_bytes) if equal == "kv_bytes" else name
            quantity = "flops" if equal == "flops" else "parameters"
            arm = solve_feed_forward(config, name, attention, quantity, target)
        except ConfigError as error:
            left_out.append(LeftOut(name, str(error)))
            continue
        twin = next((other.name for other in arms if is_same_model(other, arm)), None)
        if twin is None:
            arms.append(arm)
        else:
            left_out.append(LeftOut(name, f"made equal, it is the same model as {twin}"))
    return arms, left_out


def is_same_model(one: Arm, other: Arm) -> bool:
    """Whether two arms, however they were asked for, come to the same layers."""
    specs = [arm.config.model_spec() for arm in (one, other)]
    layers = [[(layer.name, layer.spec) for layer in spec.plan_layers()] for spec in specs]
    return layers[0] == layers[1] and specs[0].d_feed_forward == specs[1].d_feed_forward


def measure(config: TrainingConfig, name: str, attention: str) -> Arm:
    """What a model of the config has, from one that takes no memory."""
    with torch.device("meta"):
        model = HydraModel(config.model_spec()).to(torch.bfloat16)
    n_tokens = config.context_length
    flops, cache_bytes = model.forward_flops(n_tokens), model.cache_bytes(n_tokens)
    return Arm(name, attention, config, model.n_parameters(), flops, cache_bytes)


def solve_feed_forward(config: ComparisonConfig, name: str, attention: str, equal: str, target: int) -> Arm:
    """The arm whose feed-forward width brings `parameters` or `flops` closest to the target.

    Raises:
        ConfigError: its attention alone has more than that.
    """

    def build(width: int) -> Arm:
        return measure(config.training_config(attention, d_feed_forward=width), name, attention)

    def count(arm: Arm) -> int:
        return arm.forward_flops if equal == "flops" else arm.n_parameters

    at_one = count(build(1))
    slope = count(build(2)) - at_one
    width = 1 + round((target - at_one) / slope)
    if width < 1:
        raise ConfigError(
            f"without its feed-forward layers it must stay below the baseline's {target:,} {equal}, but has "
            f"{at_one - slope:,}; give it fewer heads or a smaller latent"
        )
    return build(width)


def solve_cache(config: ComparisonConfig, attention: str, target_bytes: int) -> str:
    """The plan with the option that brings the cache of a row closest to the target, the same in all layers.

    Raises:
        ConfigError: no layer has such an option, or none of its values comes close.
    """
    entries = parse_plan(attention)
    options = {CACHE_OPTIONS[name] for name, _ in entries if name in CACHE_OPTIONS}
    if len(options) != 1:
        several = f"its layers have several, {' and '.join(sorted(options))}" if options else "no layer of it has one"
        raise ConfigError(f"one option must set the size of its cache, but {several}")
    best: Arm | None = None
    for value in range(1, config.training_config(attention).d_model + 1):
        plan = ", ".join(write_entry(name, {**options, **cache_option(name, value)}) for name, options in entries)
        try:
            candidate = measure(config.training_config(plan), attention, plan)
        except ConfigError:
            continue
        if best is None or abs(candidate.cache_bytes - target_bytes) < abs(best.cache_bytes - target_bytes):
            best = candidate
        if candidate.cache_bytes > target_bytes:
            break
    if best is None or abs(best.cache_bytes / target_bytes - 1) > CACHE_TOLERANCE:
        nearest = "" if best is None else f"; the nearest, {best.attention}, has {best.cache_bytes:,}"
        raise ConfigError(f"no value of its options gives a row a cache of {target_bytes:,} bytes{nearest}")
    return best.attention


def cache_option(name: str, value: int) -> dict[str, int]:
    """The option of a backend that sets its cache, with that value; nothing for a backend without one."""
    return {CACHE_OPTIONS[name]: value} if name in CACHE_OPTIONS else {}


def write_entry(name: str, options: dict[str, Any]) -> str:
    """One layer of a plan as text."""
    inside = ", ".join(f"{option}={value}" for option, value in options.items())
    return f"{name}({inside})" if inside else name

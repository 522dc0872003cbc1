"""`ComparisonConfig`: which attentions are compared, made equal in what, over which seeds. Torch is not imported."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from hydra.attention import plan_layers, refuse_missing_records
from hydra.attention.code import refuse_equal_names
from hydra.attention.plan import PlannedLayer
from hydra.errors import ConfigError
from scripts.config import (
    ATTENTION_FIELDS,
    TrainingConfig,
    as_papermill_arguments,
    as_tuple,
    describe_problems,
    describe_unknown,
    must,
)

EQUALITIES: tuple[Literal["parameters", "flops", "kv_bytes"], ...] = ("parameters", "flops", "kv_bytes")
# What every arm gets from the comparison itself.
TAKEN = {
    "attention": "name attentions in arms and baseline",
    "attention_options": "write options into a plan's brackets, as gqa(n_kv_heads=1)",
    "d_feed_forward": "it is solved for, so that arms are equal",
    "seed": "give n_seeds",
}
DEFAULT_ARMS = (
    "gqa(n_kv_heads=1)",
    "ccgqa",
    "mla",
    "3*lightning, gqa(n_kv_heads=4)",
)


class Words(str):
    """A text that stands in a message as it is, without quotes."""

    def __repr__(self) -> str:
        """The text itself."""
        return str(self)


Positive = Annotated[float, Field(gt=0.0)]


@dataclass(
    frozen=True,
    kw_only=True,
    config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True),
)
class ComparisonConfig:
    """Everything that decides what a comparison computes. The defaults take minutes on two cores.

    Raises:
        ConfigError: naming every unknown name, wrong type and impossible combination, with the closest known name.
    """

    module: ClassVar[str] = "scripts.compare"

    preset: str = "small"
    """What all arms share: a preset of TrainingConfig, whose d_feed_forward is the baseline's."""
    fields: dict[str, Any] = Field(default_factory=dict)
    """Fields of TrainingConfig in place of the preset's. As parameters they are given by their own names."""
    baseline: Annotated[str, Field(min_length=1)] = "gqa(n_kv_heads=4)"
    """The attention that each arm is compared with: a backend or a layer plan."""
    arms: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), BeforeValidator(as_tuple)] = (
        DEFAULT_ARMS
    )
    """The attentions that are compared with it."""
    equal: Annotated[
        tuple[Literal["parameters", "flops", "kv_bytes"], ...], Field(min_length=1), BeforeValidator(as_tuple)
    ] = EQUALITIES
    """What is made equal, one comparison for each: `parameters` and `flops` (forward, of one row) by the width of the
    feed-forward layer; `kv_bytes` (cache of one row) by the option that sets the cache, with equal parameters."""
    kv_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    """Cache of a row in the comparison at equal kv_bytes, as a share of the baseline's as it is written."""
    n_seeds: Annotated[int, Field(ge=1, le=1000)] = 3
    """Seeds of each arm, the same for all; fewer than 3 give no verdict."""
    learning_rate_factors: Annotated[tuple[Positive, ...], Field(min_length=3), BeforeValidator(as_tuple)] = (
        0.5,
        1.0,
        2.0,
    )
    """What the preset's learning rates are multiplied by, to find the best for each arm on a seed of its own."""
    confidence: Annotated[float, Field(ge=0.5, lt=1.0)] = 0.95
    """Of the intervals; 1 less this is the chance of a wrong verdict among all arms of one comparison."""
    cost_lengths: Annotated[tuple[Annotated[int, Field(ge=2)], ...], BeforeValidator(as_tuple)] = (128, 512, 2048)
    """Tokens of a row at which speed and memory are measured."""
    attention_code: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """As in TrainingConfig, of all arms."""

    def __post_init__(self) -> None:
        lists: tuple[tuple[str, tuple[object, ...]], ...] = (
            ("equal", self.equal),
            ("learning_rate_factors", self.learning_rate_factors),
            ("cost_lengths", self.cost_lengths),
        )
        for name, values in lists:
            doubled = [value for index, value in enumerate(values) if value in values[:index]]
            must(not doubled, name, f"be distinct, without a second {[*doubled, None][0]!r}", list(values))

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _refuse_plainly(cls, values: Any, build: Callable[[Any], Self]) -> Self:
        try:
            config = build(values)
        except pydantic.ValidationError as error:
            names = [*known_names(), "run_dir"]
            raise ConfigError(describe_problems(error, names)) from None
        problems = [f"{name}: {TAKEN[name]}" for name in config.fields if name in TAKEN]
        for field, attention in [("baseline", config.baseline), *(("arms", arm) for arm in config.arms)]:
            try:
                # What an arm was recorded with stays; the config is being made, and nobody has seen it yet.
                known = {**config.attention_code, **config.training_config(attention).attention_code}
                refuse_equal_names(known)
                object.__setattr__(config, "attention_code", known)
            except ConfigError as error:
                # The runs' config speaks of its own fields, which are not those that were given.
                lines = str(error).replace(f"{ATTENTION_FIELDS}:", f"{field}:").splitlines()
                problems += [line for line in lines if line not in problems]
        if not problems:
            problems = config._find_twins()
        if problems:
            raise ConfigError("\n".join(problems))
        return config

    def _find_twins(self) -> list[str]:
        """A line for each arm that is the same model as one before it, however the two are written."""
        problems, known = [], [(self.baseline, self._layers_of(self.baseline))]
        for attention in self.arms:
            layers = self._layers_of(attention)
            twin = next((other for other, other_layers in known if other_layers == layers), None)
            if twin is not None:
                who = "the baseline" if twin == self.baseline else "an arm before it"
                problems.append(
                    f"arms must be distinct, and other than the baseline, but {attention!r} is the same model as "
                    f"{twin!r}, {who}; leave one out"
                )
            known.append((attention, layers))
        return problems

    def _layers_of(self, attention: str) -> list[PlannedLayer]:
        base = self.training_config(attention)
        layers = plan_layers(
            attention,
            d_model=base.d_model,
            n_heads=base.n_heads,
            n_layers=base.n_layers,
            options={},
            code=base.attention_code,
        )
        return [dataclasses.replace(layer, options={}) for layer in layers]

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, object]) -> Self:
        """The comparison that a notebook's parameters ask for: own fields, and TrainingConfig's, by name.

        Raises:
            ConfigError: as above.
        """
        own = {field.name for field in dataclasses.fields(cls)} - {"fields"}
        unknown = [name for name in parameters if name not in known_names()]
        if unknown:
            raise ConfigError("\n".join(describe_unknown(name, parameters[name], known_names()) for name in unknown))
        fields = {name: value for name, value in parameters.items() if name not in own}
        values: dict[str, Any] = {name: value for name, value in parameters.items() if name in own}
        return cls(**values, fields=fields)

    def training_config(self, attention: str, **fields: Any) -> TrainingConfig:
        """The run of one attention; `fields` come before the comparison's own."""
        own = {"attention": attention, "attention_options": {}, "attention_code": self.attention_code}
        return TrainingConfig.preset(self.preset, **{**self.fields, **own, **fields})

    def to_json(self) -> str:
        """Every field, as config.json holds it."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The comparison that `to_json` wrote.

        Raises:
            ConfigError: it is none, or a field is missing, unknown or invalid.
        """
        try:
            stored = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"a stored comparison must be JSON, but is not: {error}") from None
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(stored, dict) or set(stored) != names:
            raise ConfigError(f"a stored comparison must be an object with the fields {', '.join(sorted(names))}")
        for attention in (stored["baseline"], *stored["arms"]):
            refuse_missing_records(attention, stored["attention_code"])
        return cls(**stored)

    def may_change(self) -> frozenset[str]:
        """Nothing: a comparison goes on as it was started."""
        return frozenset()

    def is_met_by(self, n_done: int) -> bool:
        """Always: a comparison that is done stays so."""
        return True

    def differences(self, other: "ComparisonConfig | None" = None) -> dict[str, tuple[object, object]]:
        """Fields that differ from `other` (left out: from the defaults), as (other's value, own value)."""
        theirs, mine = _flat(other or ComparisonConfig()), _flat(self)
        names = dict.fromkeys([*theirs, *mine])
        absent = None if other is None else Words("the preset's")
        return {
            name: (theirs.get(name, absent), mine.get(name, absent))
            for name in names
            if theirs.get(name) != mine.get(name)
        }

    def papermill_arguments(self) -> list[str]:
        """The `papermill` arguments that ask for this comparison."""
        defaults = _flat(ComparisonConfig())
        return as_papermill_arguments(
            {name: value for name, value in _flat(self).items() if value != defaults.get(name)}
        )

    def question(self) -> str:
        """What is asked for, in words."""
        base = self.training_config(self.baseline)
        told = {"arms", "baseline", "equal", "n_seeds", "preset", "attention_code"}
        changed = [f"{name} {json.dumps(mine)}" for name, (_, mine) in self.differences().items() if name not in told]
        return (
            f"{', '.join(self.arms)} against {self.baseline}, at equal "
            f"{', equal '.join(name.replace('_', ' ') for name in self.equal)}: models of {base.n_layers} blocks, "
            f"{base.d_model} wide, on {base.max_steps:,} steps of {base.batch_size * base.context_length:,} tokens, "
            f"{self.n_seeds} seeds. Preset {self.preset}, {'with ' + ', '.join(changed) if changed else 'unchanged'}."
        )


def known_names() -> list[str]:
    """Every parameter of a comparison."""
    own = [field.name for field in dataclasses.fields(ComparisonConfig) if field.name != "fields"]
    shared = [field.name for field in dataclasses.fields(TrainingConfig) if field.name != "preset_name"]
    return [*own, *(name for name in shared if name not in own)]


def _flat(config: ComparisonConfig) -> dict[str, Any]:
    values = asdict(config)
    return {**values.pop("fields"), **values}

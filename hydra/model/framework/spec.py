"""ModelSpec: the checked description of a language model. No torch in this file."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from hydra.attention import PlannedLayer, plan_layers, record_plan_code, refuse_missing_records
from hydra.attention.spec import check_float, check_int, check_known
from hydra.errors import ConfigError

FEED_FORWARDS = ("squared_relu", "swiglu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only language model: embedding, pre-norm blocks, norm, head.

    Raises:
        ConfigError: a value that cannot be, named by its field.
    """

    vocab_size: int
    """Rows V of the embedding."""
    d_model: int
    """Width D of the residual stream."""
    n_layers: int
    """Blocks, each attention then feed-forward."""
    n_heads: int
    """Heads of the multi-head reference; the head width is d_model / n_heads."""
    attention: str
    """Name of an attention backend (hydra.attention.available_backends()), path:Class of a class of your own, or a plan
    of several; see hydra.attention.plan."""
    attention_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Options for every layer whose backend has them, each a number, text or truth value; what is left out takes the
    backend's default."""
    feed_forward: str
    """swiglu or squared_relu."""
    d_feed_forward: int
    """Width F of the feed-forward network."""
    tie_embeddings: bool
    """Whether the head is the embedding's own matrix."""
    norm_eps: float
    """Added to the mean square in every RMSNorm."""
    zero_init: bool = False
    """Whether what adds to the residual stream starts at zero, so that every block starts as the identity."""
    attention_code: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """What is known of the files of classes by path (hydra.attention.code); what is left out is read from the files."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "d_feed_forward"):
            check_int(name, getattr(self, name))
        check_known("feed_forward", [self.feed_forward], FEED_FORWARDS)
        check_float("norm_eps", self.norm_eps, above=0.0, up_to=1.0)
        for name in ("tie_embeddings", "zero_init"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name} must be True or False, but got {name}={getattr(self, name)!r}")
        if not isinstance(self.attention_options, Mapping):
            raise ConfigError(
                f"attention_options must be a mapping of option to value, but got {self.attention_options!r}"
            )
        # A copy of its own, so that changing the caller's mapping does not change a spec that was checked.
        object.__setattr__(self, "attention_options", dict(self.attention_options))
        code = record_plan_code(self.attention, self.attention_code, Path())
        object.__setattr__(self, "attention_code", code)
        self.plan_layers()

    def plan_layers(self) -> list[PlannedLayer]:
        """The attention of each block."""
        return plan_layers(
            self.attention,
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_layers=self.n_layers,
            options=self.attention_options,
            code=self.attention_code,
        )

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, ready for JSON; from_dict takes it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Self:
        """Build from what to_dict gave; ConfigError for an unknown or missing field, or a value that cannot be."""
        names = [field.name for field in dataclasses.fields(cls)]
        check_known("model field", mapping, names)
        # Two came later: how a model began does not matter to what was built before, and none had code of its own.
        missing = [name for name in names if name not in mapping and name not in ("zero_init", "attention_code")]
        if missing:
            raise ConfigError(f"a model must have the fields {', '.join(names)}, but got none of {', '.join(missing)}")
        refuse_missing_records(mapping["attention"], mapping.get("attention_code", {}))
        return cls(**mapping)

"""AttentionSpec: the checked, torch-free description of one attention layer, and the checks that specs share."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, Self

from hydra.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What every attention layer is told; a backend's spec adds its options as fields.

    Options that were not asked for come from `default_options`, so a spec never holds a value still to be decided.
    """

    d_model: int
    """Width D of the residual stream."""
    n_heads: int
    """Head count of the multi-head reference: the head width is d_model / n_heads whatever the backend does with it."""
    layer_index: int = 0
    """Which layer of the model this is, from 0."""
    n_layers: int = 1
    """How many layers the model has."""

    def __post_init__(self) -> None:
        check_int("d_model", self.d_model)
        check_int("n_heads", self.n_heads)
        check_int("n_layers", self.n_layers)
        check_int("layer_index", self.layer_index, minimum=0)
        if self.layer_index >= self.n_layers:
            raise ConfigError(
                f"layer_index must be below n_layers={self.n_layers}, but got layer_index={self.layer_index}; "
                "count layers from 0"
            )
        check_divides("n_heads", self.n_heads, "d_model", self.d_model)

    @property
    def head_width(self) -> int:
        """Width H of one head."""
        return self.d_model // self.n_heads

    @classmethod
    def default_options(cls, d_model: int, n_heads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the options that `options` does not name; they may depend on the shape and on those it does."""
        raise NotImplementedError

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of the options of this backend, in the order of its fields."""
        shared = {field.name for field in dataclasses.fields(AttentionSpec)}
        return [field.name for field in dataclasses.fields(cls) if field.name not in shared]

    @classmethod
    def from_options(
        cls, *, d_model: int, n_heads: int, layer_index: int, n_layers: int, options: Mapping[str, Any]
    ) -> Self:
        """Build and check a spec.

        Raises:
            ConfigError: an option that this backend does not have (with the closest one it has), a value of the wrong
                type or range, or a combination that cannot be; the message names the field.
        """
        check_known("option", options, cls.option_names())
        check_int("d_model", d_model)
        check_int("n_heads", n_heads)
        # Defaults may be computed from other options, so what was asked for is checked in __post_init__ after filling.
        defaults = cls.default_options(d_model, n_heads, options)
        values = {name: options[name] if name in options else defaults[name] for name in cls.option_names()}
        return cls(d_model=d_model, n_heads=n_heads, layer_index=layer_index, n_layers=n_layers, **values)


def check_known(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise ConfigError for the first of `names` that is not in `known`, naming the closest known one."""
    known = list(known)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}?" if close else "use one of them"
            raise ConfigError(f"{kind} must be one of {', '.join(known)}, but got {kind}={name!r}; {hint}")


def check_int(name: str, value: object, minimum: int = 1) -> None:
    """Raise ConfigError unless value is an int (bool is not one) of at least `minimum`."""
    if type(value) is not int or value < minimum:
        raise ConfigError(f"{name} must be an integer of at least {minimum}, but got {name}={value!r}; correct {name}")


def check_float(name: str, value: object, *, above: float, up_to: float = math.inf) -> None:
    """Raise ConfigError unless value is a finite number (bool is not one) with above < value <= up_to."""
    is_number = type(value) in (int, float)
    if not is_number or not math.isfinite(value) or not above < value <= up_to:  # type: ignore[arg-type, operator]
        limit = "" if up_to == math.inf else f" and at most {up_to}"
        raise ConfigError(
            f"{name} must be a finite number above {above}{limit}, but got {name}={value!r}; correct {name}"
        )


def check_divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    """Raise ConfigError unless divisor divides value."""
    if value % divisor:
        raise ConfigError(
            f"{divisor_name} must divide {name}, but got {divisor_name}={divisor} and {name}={value}; "
            f"try {divisor_name}={largest_divisor(value, divisor)}"
        )


def largest_divisor(value: int, at_most: int) -> int:
    """The largest divisor of value that is not above at_most (at least 1)."""
    return next(divisor for divisor in range(max(1, min(at_most, value)), 0, -1) if value % divisor == 0)

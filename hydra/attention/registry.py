"""Attention backends by name. A backend's modules are imported when it is asked for, and its spec without torch."""

import dataclasses
import importlib
import re
from typing import TYPE_CHECKING, cast

from hydra.attention.code import split_name
from hydra.attention.spec import AttentionSpec, check_known
from hydra.errors import ConfigError

if TYPE_CHECKING:
    from hydra.attention.base import AttentionBackend


@dataclasses.dataclass(frozen=True)
class BackendEntry:
    """Where a backend lives: package of `spec.py` and `attention.py`, and the names of the two classes in them."""

    package: str
    spec_class: str
    layer_class: str


BACKENDS = {
    "ccgqa": BackendEntry("hydra.attention.backends.ccgqa", "CCGQASpec", "CompressedConvolutionalAttention"),
    "gqa": BackendEntry("hydra.attention.backends.gqa", "GQASpec", "GroupedQueryAttention"),
    "lightning": BackendEntry("hydra.attention.backends.lightning", "LightningSpec", "LightningAttention"),
    "mla": BackendEntry("hydra.attention.backends.mla", "MLASpec", "LatentAttention"),
}


def available_backends() -> list[str]:
    """Names that build_attention takes, sorted."""
    return sorted(BACKENDS)


def find_entry(name: str) -> BackendEntry:
    """Where a backend lives; ConfigError lists the known names for an unknown one, and says how a class is named."""
    if re.fullmatch(r".*\.py(:.*)?", name):
        path = name.partition(":")[0]
        raise ConfigError(
            f"a class of your own must be named with its file, path.py:Class, but got attention={name!r}; "
            f"write {path}:MyAttention, with the name of the class in it"
        )
    try:
        check_known("attention", [name], available_backends())
    except ConfigError as error:
        raise ConfigError(f"{error}; a class of your own is path.py:Class") from None
    return BACKENDS[name]


def load_spec_class(name: str) -> type[AttentionSpec]:
    """The spec class of a backend, without importing torch; ConfigError lists the known names for an unknown one."""
    entry = find_entry(name)
    return cast("type[AttentionSpec]", getattr(importlib.import_module(f"{entry.package}.spec"), entry.spec_class))


def load_layer_class(name: str) -> "type[AttentionBackend]":
    """The torch module class of a backend, or of any class by path; ConfigError lists the names for an unknown one."""
    if split_name(name):
        return cast("type[AttentionBackend]", importlib.import_module("hydra.attention.custom").CustomAttention)
    entry = find_entry(name)
    module = importlib.import_module(f"{entry.package}.attention")
    return cast("type[AttentionBackend]", getattr(module, entry.layer_class))

"""Attention backends by name. A backend's modules are imported when it is asked for, and its spec without torch."""

import dataclasses
import importlib
from typing import TYPE_CHECKING, cast

from hydra.attention.code import split_name
from hydra.attention.spec import AttentionSpec, check_known

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


def load_spec_class(name: str) -> type[AttentionSpec]:
    """The spec class of a backend, without importing torch; ConfigError lists the known names for an unknown one."""
    check_known("attention", [name], available_backends())
    entry = BACKENDS[name]
    return cast("type[AttentionSpec]", getattr(importlib.import_module(f"{entry.package}.spec"), entry.spec_class))


def load_layer_class(name: str) -> "type[AttentionBackend]":
    """The torch module class of a backend, or of any class by path; ConfigError lists the names for an unknown one."""
    if split_name(name):
        return cast("type[AttentionBackend]", importlib.import_module("hydra.attention.custom").CustomAttention)
    check_known("attention", [name], available_backends())
    entry = BACKENDS[name]
    module = importlib.import_module(f"{entry.package}.attention")
    return cast("type[AttentionBackend]", getattr(module, entry.layer_class))

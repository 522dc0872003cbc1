"""The language model around the attention layers: ModelSpec describes it, build_model builds it, generate samples it.

Importing this package does not import torch, so that a ModelSpec can be checked before anything slow happens; the names
that need torch load it when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hydra.model.framework.spec import ModelSpec

if TYPE_CHECKING:
    from hydra.model.framework.factory import build_model
    from hydra.model.framework.generation import generate
    from hydra.model.framework.model import HydraModel, ModelCache, ModelOutput

__all__ = ["HydraModel", "ModelCache", "ModelOutput", "ModelSpec", "build_model", "generate"]

_MODULES = {
    "HydraModel": "model",
    "ModelCache": "model",
    "ModelOutput": "model",
    "build_model": "factory",
    "generate": "generation",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

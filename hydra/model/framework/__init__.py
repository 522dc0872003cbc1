"""The model around the attention layers: ModelSpec describes it, build_model builds it, generate samples it."""

from hydra.model.framework.execution import Execution
from hydra.model.framework.factory import build_model
from hydra.model.framework.generation import generate
from hydra.model.framework.model import HydraModel, ModelCache, ModelOutput
from hydra.model.framework.spec import ModelSpec

__all__ = ["Execution", "HydraModel", "ModelCache", "ModelOutput", "ModelSpec", "build_model", "generate"]

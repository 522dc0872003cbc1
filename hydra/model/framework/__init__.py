"""The model around the attention layers: ModelSpec describes it, build_model builds it, generate and Decoder sample."""

from hydra.model.framework.decoding import Decoder
from hydra.model.framework.execution import Execution
from hydra.model.framework.factory import build_model
from hydra.model.framework.generation import generate
from hydra.model.framework.model import HydraModel, ModelCache, ModelOutput
from hydra.model.framework.quantisation import Int8Weights, quantise_int8
from hydra.model.framework.spec import ModelSpec

__all__ = [
    "Decoder",
    "Execution",
    "HydraModel",
    "Int8Weights",
    "ModelCache",
    "ModelOutput",
    "ModelSpec",
    "build_model",
    "generate",
    "quantise_int8",
]

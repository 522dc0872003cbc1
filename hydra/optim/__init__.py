"""Parameter groups, optimizers and their state, float32 masters, learning-rate schedules. The updates are torch's."""

from hydra.optim.groups import ParameterGroups, group_parameters
from hydra.optim.masters import MasterWeights
from hydra.optim.optimizers import OptimizerSpec, build_optimizers
from hydra.optim.schedules import build_schedule, cosine, warmup_stable_decay
from hydra.optim.state import load_optimizer_tensors, optimizer_tensors

__all__ = [
    "MasterWeights",
    "OptimizerSpec",
    "ParameterGroups",
    "build_optimizers",
    "build_schedule",
    "cosine",
    "group_parameters",
    "load_optimizer_tensors",
    "optimizer_tensors",
    "warmup_stable_decay",
]

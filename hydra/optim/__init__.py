"""Parameter groups, optimizers (Muon, and AdamW of torch or torchao), their state, float32 masters, schedules."""

from hydra.optim.groups import ParameterGroups, group_parameters
from hydra.optim.masters import MasterWeights
from hydra.optim.optimizers import AdamW, OptimizerSpec, build_optimizers, set_learning_rate, state_bytes
from hydra.optim.schedules import build_schedule, cosine, warmup_stable_decay
from hydra.optim.state import load_optimizer_tensors, optimizer_tensors

__all__ = [
    "AdamW",
    "MasterWeights",
    "OptimizerSpec",
    "ParameterGroups",
    "build_optimizers",
    "build_schedule",
    "cosine",
    "group_parameters",
    "load_optimizer_tensors",
    "optimizer_tensors",
    "set_learning_rate",
    "state_bytes",
    "warmup_stable_decay",
]

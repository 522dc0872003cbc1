"""Parameter groups, learning-rate schedules and state of optimizers. The optimizer itself is torch's AdamW."""

from hydra.optim.groups import build_parameter_groups
from hydra.optim.schedules import build_schedule, cosine, warmup_stable_decay
from hydra.optim.state import load_optimizer_tensors, optimizer_tensors

__all__ = [
    "build_parameter_groups",
    "build_schedule",
    "cosine",
    "load_optimizer_tensors",
    "optimizer_tensors",
    "warmup_stable_decay",
]

"""Parameter groups and learning-rate schedules. The optimizer itself is torch's AdamW."""

from hydra.optim.groups import build_parameter_groups
from hydra.optim.schedules import cosine, warmup_stable_decay

__all__ = ["build_parameter_groups", "cosine", "warmup_stable_decay"]

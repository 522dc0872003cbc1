"""Run directory, ledger, checkpoints and processes. Importing it does not import torch."""

from hydra.runtime.ledger import RunStatus
from hydra.runtime.paths import workspace_root
from hydra.runtime.run import Run

__all__ = ["Run", "RunStatus", "workspace_root"]

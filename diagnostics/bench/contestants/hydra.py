"""HYDRA's own trainer at a gate: `python -m diagnostics.bench.contestants.hydra JSON`."""

import json
import sys
from pathlib import Path
from typing import Any

from diagnostics.bench.gate import Gate
from scripts.config import TrainingConfig
from scripts.trainer import StepResult, Trainer


class GatedTrainer(Trainer):
    """The trainer as it is, but for waiting before each step."""

    gate: Gate

    def _prepare(self) -> None:
        super()._prepare()
        self.gate.keep_peak()  # the trainer counts from here on, its peers from their start

    def train_step(self) -> StepResult:
        """See Trainer.train_step."""
        self.gate.wait()
        result = super().train_step()
        self.gate.done(result.loss_nats)
        return result


def main(spec: dict[str, Any]) -> None:
    """Train what the spec's `config` says in its `run_dir`, for as long as the harness asks."""
    trainer = GatedTrainer(TrainingConfig.preset("debug", **spec["config"]), Path(spec["run_dir"]))
    trainer.gate = Gate(spec)
    trainer.train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

"""transformers' Llama under its Trainer at a gate, in the peers' environment: float32, or bf16=True."""

import json
import sys
import tempfile
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from diagnostics.bench.contestants.llama import build_config
from diagnostics.bench.gate import Gate


class Rows(Dataset):
    """The harness's batches, row by row; transformers shifts the labels itself."""

    def __init__(self, path: str) -> None:
        batches = np.load(path, mmap_mode="r")
        self.rows = batches.reshape(-1, batches.shape[-1])

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        row = torch.from_numpy(self.rows[number % len(self.rows)][:-1].astype(np.int64))
        return {"input_ids": row, "labels": row}


class AtGate(TrainerCallback):
    """Waits before each step."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """See TrainerCallback."""
        self.gate.wait()


class ReportingTrainer(Trainer):
    """Hands each step's loss to the gate."""

    gate: Gate

    def get_train_dataloader(self) -> Any:
        """The rows in their order, so that all contestants see the same batches."""
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=self.args.per_device_train_batch_size)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See Trainer."""
        loss = super().training_step(*args, **kwargs)
        self.gate.done(float(loss))
        return loss


def main(spec: dict[str, Any]) -> None:
    """Train for as long as the harness asks."""
    gate = Gate(spec)
    torch.manual_seed(0)
    config = build_config(spec, use_cache=False)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=spec["n_rows"],
        max_steps=10**6,
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=spec["bf16"],
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = ReportingTrainer(
        model=LlamaForCausalLM(config), args=arguments, train_dataset=Rows(spec["batches"]), callbacks=[AtGate(gate)]
    )
    trainer.gate = gate
    trainer.train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

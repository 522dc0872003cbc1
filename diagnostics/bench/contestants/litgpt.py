"""litgpt's GPT as its pretraining runs it by default (Fabric, bf16-mixed, compiled), in the peers' environment."""

import json
import sys
from typing import Any

import lightning
import numpy as np
import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy

from diagnostics.bench.gate import Gate


def main(spec: dict[str, Any]) -> None:
    """Train for as long as the harness asks."""
    gate = Gate(spec)
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.seed_everything(0)
    config = Config(
        name="bench",
        block_size=spec["n_tokens"],
        vocab_size=spec["vocab_size"],
        padded_vocab_size=spec["vocab_size"],
        n_layer=spec["n_layers"],
        n_head=spec["n_heads"],
        n_embd=spec["d_model"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=spec["d_gated_feed_forward"],
    )
    model = GPT(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02)
    model = fabric.setup(torch.compile(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec["learning_rate"], weight_decay=0.1, betas=(0.9, 0.95))
    optimizer = fabric.setup_optimizers(optimizer)
    batches, step = np.load(spec["batches"], mmap_mode="r"), 0
    while True:
        gate.wait()
        rows = torch.from_numpy(batches[step % len(batches)].astype(np.int64))
        loss = chunked_cross_entropy(model(rows[:, :-1].contiguous()), rows[:, 1:].contiguous())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        gate.done(loss.item())
        step += 1


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

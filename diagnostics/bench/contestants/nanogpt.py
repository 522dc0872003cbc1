"""nanoGPT's published CPU recipe, written anew: GPT-2 blocks, float32, eager, torch's attention, AdamW.

`python -m diagnostics.bench.contestants.nanogpt JSON` either steps at a gate (throughput, memory) or trains its whole
recipe on a text of characters and prints its validation loss. B rows, T tokens, D width, N heads, V vocabulary.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diagnostics.bench.gate import Gate


class Block(nn.Module):
    """LayerNorm without bias, attention, LayerNorm, GELU network of four times the width."""

    def __init__(self, d_model: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(d_model, bias=False), nn.LayerNorm(d_model, bias=False)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.up = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        n_batch, n_tokens, d_model = x_BTD.shape
        heads = self.qkv(self.norm_1(x_BTD)).view(n_batch, n_tokens, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True, dropout_p=dropout)
        out_BTD = self.out(out.transpose(1, 2).reshape(n_batch, n_tokens, d_model))
        x_BTD = x_BTD + F.dropout(out_BTD, dropout)
        return x_BTD + F.dropout(self.down(F.gelu(self.up(self.norm_2(x_BTD)))), dropout)


class NanoGPT(nn.Module):
    """Learned positions, tied head, GPT-2's initialisation."""

    def __init__(self, n_vocab: int, n_tokens: int, d_model: int, n_layers: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(n_vocab, d_model), nn.Embedding(n_tokens, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model, bias=False)
        self.dropout = dropout
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                depth = math.sqrt(2 * n_layers) if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 / depth)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean loss in nats per token."""
        x_BTD = self.tokens(inputs_BT) + self.positions(torch.arange(inputs_BT.shape[1]))
        x_BTD = F.dropout(x_BTD, self.dropout if self.training else 0.0)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = F.linear(self.norm(x_BTD), self.tokens.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def build_optimizer(model: nn.Module, learning_rate: float, beta_2: float) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only, in torch's default implementation on a CPU."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, beta_2))


def train_step(model: NanoGPT, optimizer: torch.optim.Optimizer, inputs_BT: Tensor, targets_BT: Tensor) -> float:
    """One step; returns the loss."""
    loss = model(inputs_BT, targets_BT)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def step_at_gate(spec: dict[str, Any]) -> None:
    """Steps on the harness's batches, for as long as it asks."""
    gate = Gate(spec)
    batches = np.load(spec["batches"], mmap_mode="r")
    torch.manual_seed(0)
    model = NanoGPT(spec["vocab_size"], spec["n_tokens"], spec["d_model"], spec["n_layers"], spec["n_heads"], 0.0)
    optimizer = build_optimizer(model, spec["learning_rate"], 0.95)
    step = 0
    while True:
        gate.wait()
        rows = torch.from_numpy(batches[step % len(batches)].astype(np.int64))
        gate.done(train_step(model, optimizer, rows[:, :-1], rows[:, 1:]))
        step += 1


def cosine(recipe: dict[str, Any], step: int, share: float) -> float:
    """From 1 after the warm-up to 0.1 at the end, which is a number of steps, or, for a recipe of so many seconds, a
    time: so the rate has fallen when the time is up, however many steps that were."""
    fall = share
    if not recipe["seconds"]:
        fall = max(0.0, (step - recipe["warmup_steps"]) / (recipe["max_steps"] - recipe["warmup_steps"]))
    return 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * fall))


def cut_windows(ids: Tensor, n_tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets [windows, n_tokens] of a text in whole windows, 64 windows at a time."""
    n_windows = (len(ids) - 1) // n_tokens
    inputs = ids[: n_windows * n_tokens].view(n_windows, n_tokens)
    targets = ids[1 : n_windows * n_tokens + 1].view(n_windows, n_tokens)
    return list(zip(inputs.split(64), targets.split(64), strict=True))


def train_recipe(recipe: dict[str, Any]) -> None:
    """Its whole recipe on characters; prints one line of JSON. Time counts from the start of the process."""
    torch.set_num_threads(recipe["threads"])
    torch.manual_seed(recipe["seed"])
    train_text, validation_text = (Path(recipe[name]).read_text() for name in ("train_text", "validation_text"))
    characters = sorted(set(train_text) | set(validation_text))
    index = {character: number for number, character in enumerate(characters)}
    train, validation = (torch.tensor([index[c] for c in text]) for text in (train_text, validation_text))
    n_tokens, n_rows = recipe["n_tokens"], recipe["n_rows"]
    model = NanoGPT(
        len(characters), n_tokens, recipe["d_model"], recipe["n_layers"], recipe["n_heads"], recipe["dropout"]
    )
    optimizer = build_optimizer(model, recipe["learning_rate"], 0.99)
    began, step, share = time.perf_counter(), 0, 0.0
    while share < 1.0:
        warmup = min(1.0, (step + 1) / (recipe["warmup_steps"] + 1))
        for group in optimizer.param_groups:
            group["lr"] = recipe["learning_rate"] * warmup * cosine(recipe, step, share)
        starts = torch.randint(len(train) - n_tokens, (n_rows,))
        rows = torch.stack([train[start : start + n_tokens + 1] for start in starts])
        train_step(model, optimizer, rows[:, :-1], rows[:, 1:])
        step += 1
        elapsed = time.perf_counter() - began
        share = elapsed / recipe["seconds"] if recipe["seconds"] else step / recipe["max_steps"]
    train_seconds = time.perf_counter() - began
    model.eval()
    judged = time.perf_counter()
    windows = cut_windows(validation, n_tokens)
    with torch.no_grad():
        sums = [model(i, t).item() * len(i) for i, t in windows]
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    result = {
        "val_loss_nats": sum(sums) / sum(len(i) for i, _ in windows),
        "n_parameters": n_parameters,
        "steps": step,
        "train_seconds": train_seconds,
        "evaluation_seconds": time.perf_counter() - judged,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if "train_text" in given:
        train_recipe(given)
    else:
        step_at_gate(given)

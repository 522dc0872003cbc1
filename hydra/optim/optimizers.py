"""The optimizers of a run: AdamW for everything, or Muon for the hidden matrices and AdamW for the rest."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hydra.optim.groups import group_parameters
from hydra.optim.muon import Muon

# torch's optimizers import torch's compiler when they are made and at every step, only to tell it to keep out. That
# takes a second, as long as importing torch; nothing here compiles an optimizer, so they are taken as they are written.
for _method in (Optimizer.add_param_group, Optimizer.zero_grad):
    _written = inspect.unwrap(_method)
    _written.__dynamo_disable = _written  # type: ignore[attr-defined]


class AdamW(torch.optim.AdamW):
    """torch's AdamW without the compiler's import."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """What `build_optimizers` needs to know; rates are peaks, decay is per step times the rate."""

    kind: str
    """`adamw`, or `muon` (with AdamW for tables and vectors)."""
    learning_rate: float
    weight_decay: float
    adam_betas: tuple[float, float]
    adam_eps: float
    muon_learning_rate: float
    muon_momentum: float
    muon_weight_decay: float


def build_optimizers(named: Mapping[str, nn.Parameter], spec: OptimizerSpec, dtype: torch.dtype) -> list[Optimizer]:
    """Optimizers that step each of the named parameters exactly once.

    AdamW: Loshchilov and Hutter, arXiv 1711.05101; Muon: see hydra.optim.muon. Every group keeps its peak rate under
    `peak_lr`: a schedule multiplies that.

    Args:
        named: float32 parameters by the model's names.
        dtype: of Muon's matrix products.
    """
    groups = group_parameters(named)
    adamw: list[dict[str, Any]] = [
        {"params": list(groups.tables.values()), "weight_decay": spec.weight_decay},
        {"params": list(groups.vectors.values()), "weight_decay": 0.0},
    ]
    optimizers: list[Optimizer] = []
    if spec.kind == "muon":
        optimizers.append(
            Muon(
                groups.hidden.values(),
                lr=spec.muon_learning_rate,
                weight_decay=spec.muon_weight_decay,
                momentum=spec.muon_momentum,
                dtype=dtype,
            )
        )
    else:
        assert spec.kind == "adamw", spec.kind
        adamw.append({"params": list(groups.hidden.values()), "weight_decay": spec.weight_decay})
    adamw = [group for group in adamw if group["params"]]
    optimizers.append(AdamW(adamw, lr=spec.learning_rate, betas=spec.adam_betas, eps=spec.adam_eps, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers

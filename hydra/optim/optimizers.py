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


class AdamW(torch.optim.AdamW):
    """torch's AdamW without the compiler's import; see `_keep_compiler_out`."""

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
    adam_state: str
    """`float32`, or `8bit`: AdamW's moments as codes of 8 bits, in blocks of 256 with a scale each (torchao)."""
    muon_learning_rate: float
    muon_momentum: float
    muon_weight_decay: float


def build_optimizers(named: Mapping[str, nn.Parameter], spec: OptimizerSpec, dtype: torch.dtype) -> list[Optimizer]:
    """Optimizers that step each of the named parameters exactly once.

    AdamW: Loshchilov and Hutter, arXiv 1711.05101; its 8-bit state: Dettmers et al., arXiv 2110.02861; Muon: see
    hydra.optim.muon. Every group keeps its peak rate under `peak_lr`, of which `set_learning_rate` takes a share.

    Args:
        named: float32 parameters by the model's names.
        dtype: of Muon's matrix products.
    """
    _keep_compiler_out()
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
    common: dict[str, Any] = {"lr": spec.learning_rate, "betas": spec.adam_betas, "eps": spec.adam_eps}
    if spec.adam_state == "8bit":
        from torchao.optim import AdamW8bit  # imports torch's compiler: it compiles its step

        optimizers.append(AdamW8bit(adamw, **common))
    else:
        assert spec.adam_state == "float32", spec.adam_state
        optimizers.append(AdamW(adamw, **common, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = float(group["lr"])
    return optimizers


def state_bytes(named: Mapping[str, nn.Parameter], spec: OptimizerSpec) -> int:
    """What the optimizers keep for these parameters and write into a checkpoint, but for counters."""
    hidden = group_parameters(named).hidden if spec.kind == "muon" else {}
    n_bytes = sum(4 * parameter.numel() for parameter in hidden.values())
    for name, parameter in named.items():
        n = parameter.numel()
        # torchao keeps a code for each number, a scale for 256, and what the 256 codes mean; small ones in float32.
        has_codes = spec.adam_state == "8bit" and n >= 4096 and n % 256 == 0
        if name not in hidden:
            n_bytes += 2 * (n + 4 * (n // 256) + 4 * 256) if has_codes else 8 * n
    return n_bytes


def set_learning_rate(optimizer: Optimizer, share: float) -> None:
    """Set the rate of every group to `share` of its peak."""
    for group in optimizer.param_groups:
        rate = share * group["peak_lr"]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)  # a compiled step reads it from there; another number would be compiled anew
        else:
            group["lr"] = rate


def _keep_compiler_out() -> None:
    """Take torch's methods as they are written.

    torch wraps them so that its compiler, should it ever come by, keeps out of them; for that each first call imports
    it, which takes as long as importing torch. No region that is compiled here makes an optimizer or drops gradients.
    """
    for method in (Optimizer.add_param_group, Optimizer.zero_grad):
        written = inspect.unwrap(method)
        written.__dynamo_disable = written

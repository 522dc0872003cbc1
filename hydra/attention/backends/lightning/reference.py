"""Lightning attention, slowly, one token at a time (MiniMax-01, arXiv 2501.08313, section 2.2, and its released code).

T tokens of one row, D model width, N heads, H head width.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from hydra.attention.backends.lightning.spec import LightningSpec


@dataclasses.dataclass(frozen=True)
class LightningReference:
    """All that the fast path can be compared with; float32, or float64 for float64 input."""

    out_BTD: Tensor
    state_BNHH: Tensor
    """Behind the last token, as a cache holds it."""


def compute_reference(
    parameters: Mapping[str, Tensor], spec: LightningSpec, x_BTD: Tensor, document_ids_BT: Tensor | None = None
) -> LightningReference:
    """Run the layer with these parameters (by name) on x_BTD; document ids are integers, or None for one document."""
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    weights = {name: parameter.to(dtype) for name, parameter in parameters.items()}
    rows = []
    for row, x_TD in enumerate(x_BTD.to(dtype)):
        ids = [0] * len(x_TD) if document_ids_BT is None else document_ids_BT[row].tolist()
        rows.append(compute_row(weights, spec, x_TD, ids))
    return LightningReference(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def compute_row(weights: Mapping[str, Tensor], spec: LightningSpec, x_TD: Tensor, ids: list[int]) -> tuple[Tensor, ...]:
    """Outputs (T, D) and last state (N, H, H) of one row of the batch."""
    states = [x_TD.new_zeros(spec.head_width, spec.head_width) for _ in range(spec.n_heads)]
    outputs = []
    for t, x_D in enumerate(x_TD):
        q_NH, k_NH, v_NH = (
            swish(weights[f"{name}_proj.weight"] @ x_D).view(spec.n_heads, spec.head_width) for name in "qkv"
        )
        if t > 0 and ids[t] != ids[t - 1]:
            states = [torch.zeros_like(state_HH) for state_HH in states]
        heads = []
        for n in range(spec.n_heads):
            # kv_t = lambda kv_(t-1) + k_t^T v_t, o_t = q_t kv_t: the token's own part has weight 1.
            states[n] = compute_decay(spec, n) * states[n] + torch.outer(k_NH[n], v_NH[n])
            heads.append(q_NH[n] @ states[n])
        out_D = torch.cat(heads)
        out_D = out_D / (out_D.square().mean() + 1e-6).sqrt() * weights["norm.weight"]
        if spec.gate_rank == 0:
            gate_D = weights["gate_proj.weight"] @ x_D
        else:
            gate_D = weights["gate_up_proj.weight"] @ (weights["gate_down_proj.weight"] @ x_D)
        outputs.append(weights["o_proj.weight"] @ (out_D / (1 + torch.exp(-gate_D))))
    return torch.stack(outputs), torch.stack(states)


def swish(x: Tensor) -> Tensor:
    """x sigmoid(x), which is SiLU."""
    return x / (1 + torch.exp(-x))


def compute_decay(spec: LightningSpec, head: int) -> float:
    """lambda of a head, from 0: exp(-slope), slope = (2^(-8/N))^(head + 1) (1 - l / (L - 1 + 1e-5) + 1e-5)."""
    slope = (2 ** (-8 / spec.n_heads)) ** (head + 1)
    slope *= 1 - spec.layer_index / (spec.n_layers - 1 + 1e-5) + 1e-5
    return 2.718281828459045**-slope

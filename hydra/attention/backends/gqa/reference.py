"""Grouped-query attention, slowly, one query at a time (arXiv 2305.13245; rotary embedding arXiv 2104.09864).

T tokens of one row, D model width, N query heads, K key/value heads, H head width.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hydra.attention.backends.gqa.spec import GQASpec


def compute_reference(
    parameters: Mapping[str, Tensor], spec: GQASpec, x_BTD: Tensor, document_ids_BT: Tensor | None = None
) -> Tensor:
    """The layer's output (B, T, D) in float32, or float64 for float64 input.

    Args:
        parameters: of the layer, by name.
        spec: of the layer.
        x_BTD: activations.
        document_ids_BT: integers, or None for one document in each row.
    """
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    weights = {name: parameter.to(dtype) for name, parameter in parameters.items()}
    rows = []
    for row, x_TD in enumerate(x_BTD.to(dtype)):
        ids = [0] * len(x_TD) if document_ids_BT is None else document_ids_BT[row].tolist()
        rows.append(compute_row(weights, spec, x_TD, ids))
    return torch.stack(rows)


def compute_row(weights: Mapping[str, Tensor], spec: GQASpec, x_TD: Tensor, ids: list[int]) -> Tensor:
    """One row of the batch."""
    n_tokens, width, group = len(x_TD), spec.head_width, spec.n_heads // spec.n_kv_heads
    q_TNH = (x_TD @ weights["q_proj.weight"].T).view(n_tokens, spec.n_heads, width)
    k_TKH = (x_TD @ weights["k_proj.weight"].T).view(n_tokens, spec.n_kv_heads, width)
    v_TKH = (x_TD @ weights["v_proj.weight"].T).view(n_tokens, spec.n_kv_heads, width)
    if spec.qk_norm:
        q_TNH, k_TKH = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in (q_TNH, k_TKH))
    outputs = []
    for t in range(n_tokens):
        oldest = max(0, t + 1 - spec.window) if spec.window else 0
        visible = [s for s in range(oldest, t + 1) if ids[s] == ids[t]]
        heads = []
        for n in range(spec.n_heads):
            q_H = rotate(q_TNH[t, n], t, spec.rope_base)
            keys = torch.stack([rotate(k_TKH[s, n // group], s, spec.rope_base) for s in visible])
            weight_S = torch.softmax(keys @ q_H / math.sqrt(width), dim=0)
            heads.append(weight_S @ v_TKH[visible, n // group])
        outputs.append(weights["o_proj.weight"] @ torch.cat(heads))
    return torch.stack(outputs)


def rotate(x_H: Tensor, position: int, base: float) -> Tensor:
    """2104.09864 eq. 15: rotate the plane of channels (r, H/2 + r) by position * base**(-2r/H)."""
    half = len(x_H) // 2
    first, second = [], []
    for r in range(half):
        angle = position * base ** (-2 * r / len(x_H))
        first.append(x_H[r] * math.cos(angle) - x_H[half + r] * math.sin(angle))
        second.append(x_H[r] * math.sin(angle) + x_H[half + r] * math.cos(angle))
    return torch.stack(first + second)

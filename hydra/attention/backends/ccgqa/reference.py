"""Compressed convolutional attention, slowly, one document and one token at a time, straight from arXiv 2510.04476.

"Listing 1" is that of its appendix A.1. Positions count on over the documents of a row; all else starts anew with each.
T tokens of one document, D model width, N query heads, K key/value heads, G = N / K, H head width, C = (N + K) H.
"""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hydra.attention.backends.ccgqa.spec import CCGQASpec

Weights = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class CCGQAReference:
    """All that the fast path can be compared with; float32, or float64 for float64 input."""

    out_BTD: Tensor
    q_BTNH: Tensor
    """Queries as they meet the keys."""
    k_BTKH: Tensor
    """Keys as a cache stores them: after norm, temperature and rotary embedding."""
    v_BTKH: Tensor
    u_BTC: Tensor
    """Queries and keys before the convolutions; the last k0 + k1 - 2 are the state of a cache."""
    v_previous_BTV: Tensor
    """What the next token's values take half of their channels from; the last one is the state of a cache."""


def compute_reference(
    parameters: Weights, spec: CCGQASpec, x_BTD: Tensor, document_ids_BT: Tensor | None = None
) -> CCGQAReference:
    """Run the layer with these parameters (by name) on x_BTD; document ids are integers, or None for one document."""
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    weights = {name: parameter.to(dtype) for name, parameter in parameters.items()}
    rows = []
    for row, x_TD in enumerate(x_BTD.to(dtype)):
        ids = [0] * len(x_TD) if document_ids_BT is None else document_ids_BT[row].tolist()
        starts = [t for t in range(len(ids)) if t == 0 or ids[t] != ids[t - 1]]
        documents = [
            compute_document(weights, spec, x_TD[start:stop], start)
            for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)
        ]
        rows.append([torch.cat(parts) for parts in zip(*documents, strict=True)])
    return CCGQAReference(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def compute_document(weights: Weights, spec: CCGQASpec, x_TD: Tensor, first_position: int) -> tuple[Tensor, ...]:
    """One document alone in the world; what CCGQAReference holds, for its tokens."""
    n_tokens, width = len(x_TD), spec.head_width
    group = spec.n_query_heads // spec.n_kv_heads
    # Listing 1: down-projection of queries and keys, u = [q; k].
    q_TNH = (x_TD @ weights["q_proj.weight"].T).view(n_tokens, spec.n_query_heads, width)
    k_TKH = (x_TD @ weights["k_proj.weight"].T).view(n_tokens, spec.n_kv_heads, width)
    u_TC = torch.cat([q_TNH.flatten(1), k_TKH.flatten(1)], dim=1)
    conv_T_C = convolve(weights, spec, u_TC)
    v_now = x_TD @ weights["v_proj.weight"].T
    v_previous = x_TD @ weights["v_previous_proj.weight"].T

    queries, keys, values = [], [], []
    for t in range(n_tokens):
        conv_q_NH = conv_T_C[t, : spec.query_width].view(spec.n_query_heads, width)
        conv_k_KH = conv_T_C[t, spec.query_width :].view(spec.n_kv_heads, width)
        # Eqs. 7, 8: mean of query and its key head; for a key head, the mean of that over its group.
        mean_q = [0.5 * (q_TNH[t, n] + k_TKH[t, n // group]) for n in range(spec.n_query_heads)]
        mean_k = [sum(mean_q[j * group : (j + 1) * group]) / group for j in range(spec.n_kv_heads)]
        # Eqs. 9, 10: norm sqrt(H), and sqrt(H) exp(temp_j) for keys; the rotary embedding comes after.
        position = first_position + t
        queries.append(
            torch.stack([rotate(spec, scale(conv_q_NH[n] + mean_q[n]), position) for n in range(spec.n_query_heads)])
        )
        keys.append(
            torch.stack(
                [
                    rotate(spec, scale(conv_k_KH[j] + mean_k[j]) * weights["temp"][j].exp(), position)
                    for j in range(spec.n_kv_heads)
                ]
            )
        )
        # Eq. 11: value shift; before the first token there is nothing.
        before = v_previous[t - 1] if t > 0 else torch.zeros_like(v_previous[0])
        values.append(torch.cat([v_now[t], before]).view(spec.n_kv_heads, width))

    q_out, k_out, v_out = torch.stack(queries), torch.stack(keys), torch.stack(values)
    outputs = []
    for t in range(n_tokens):
        heads = []
        for n in range(spec.n_query_heads):
            weight_S = torch.softmax(k_out[: t + 1, n // group] @ q_out[t, n] / math.sqrt(width), dim=0)
            heads.append(weight_S @ v_out[: t + 1, n // group])
        outputs.append(weights["o_proj.weight"] @ torch.cat(heads))
    return torch.stack(outputs), q_out, k_out, v_out, u_TC, v_previous


def convolve(weights: Weights, spec: CCGQASpec, u_TC: Tensor) -> Tensor:
    """Listing 1: pad (k0 - 1) + (k1 - 1) zeros once on the left, depthwise conv0, then conv1 with a group per head."""
    k0, k1, width = spec.conv_kernel_0, spec.conv_kernel_1, spec.head_width
    n_heads = spec.n_query_heads + spec.n_kv_heads
    padded = torch.cat([u_TC.new_zeros(k0 - 1 + k1 - 1, u_TC.shape[1]), u_TC])
    middle = []
    for p in range(len(padded) - (k0 - 1)):
        taps = sum(weights["conv0.weight"][:, 0, i] * padded[p + i] for i in range(k0))
        middle.append(taps + weights["conv0.bias"])
    outputs = []
    for p in range(len(middle) - (k1 - 1)):
        heads = []
        for m in range(n_heads):
            channels = slice(m * width, (m + 1) * width)
            taps = sum(weights["conv1.weight"][channels, :, i] @ middle[p + i][channels] for i in range(k1))
            heads.append(taps + weights["conv1.bias"][channels])
        outputs.append(torch.cat(heads))
    return torch.stack(outputs)


def scale(x_H: Tensor) -> Tensor:
    """sqrt(H) x / |x|, the norm floored at 1e-12 as in the released code."""
    return math.sqrt(len(x_H)) * x_H / torch.sqrt(x_H.square().sum()).clamp_min(1e-12)


def rotate(spec: CCGQASpec, x_H: Tensor, position: int) -> Tensor:
    """2104.09864 eq. 15 on the first rotary_width channels: plane (r, half + r) by position * base**(-2r/width)."""
    half = spec.rotary_width // 2
    first, second = [], []
    for r in range(half):
        angle = position * spec.rope_base ** (-2 * r / spec.rotary_width)
        first.append(x_H[r] * math.cos(angle) - x_H[half + r] * math.sin(angle))
        second.append(x_H[r] * math.sin(angle) + x_H[half + r] * math.cos(angle))
    return torch.cat([torch.stack(first + second), x_H[2 * half :]])

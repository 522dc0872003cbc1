"""Multi-head latent attention, slowly, one query and one head at a time (arXiv 2405.04434, eqs. 9-19).

T tokens of one row, D model width, N heads, L width of the latent, Q of the queries' latent, C and R channels of a
head's score without and with rotation, U value width, E = L + R.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hydra.attention.backends.mla.spec import MLASpec


class ReferenceResult(NamedTuple):
    """In float32, or float64 for float64 input."""

    out_BTD: Tensor
    cached_BTE: Tensor
    """Normalised latent and rotated shared key of every token."""


def compute_reference(
    parameters: Mapping[str, Tensor], spec: MLASpec, x_BTD: Tensor, document_ids_BT: Tensor | None = None
) -> ReferenceResult:
    """The layer's output, and what its cache must hold afterwards.

    Args:
        parameters: of the layer, by name.
        spec: of the layer.
        x_BTD: activations.
        document_ids_BT: integers, or None for one document in each row.
    """
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    weights = {name: parameter.to(dtype) for name, parameter in parameters.items()}
    outputs, cached = [], []
    for row, x_TD in enumerate(x_BTD.to(dtype)):
        ids = [0] * len(x_TD) if document_ids_BT is None else document_ids_BT[row].tolist()
        out_TD, cached_TE = compute_row(weights, spec, x_TD, ids)
        outputs.append(out_TD)
        cached.append(cached_TE)
    return ReferenceResult(torch.stack(outputs), torch.stack(cached))


def compute_row(weights: Mapping[str, Tensor], spec: MLASpec, x_TD: Tensor, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Output (T, D) and cached (T, E) of one row of the batch."""
    w_uk, w_uv = split_expansion(weights["kv_up_proj.weight"], spec)
    latents, shared_keys = [], []
    for t, x_D in enumerate(x_TD):
        compressed = weights["kv_down_proj.weight"] @ x_D
        latents.append(normalise(compressed[: spec.kv_latent_width], weights["kv_norm.weight"]))  # eq. 9
        shared_keys.append(rotate(compressed[spec.kv_latent_width :], t, spec.rope_base))  # eq. 15
    outputs = []
    for t, x_D in enumerate(x_TD):
        visible = [s for s in range(t + 1) if ids[s] == ids[t]]
        heads = []
        for n, query_X in enumerate(compute_queries(weights, spec, x_D)):
            q_R = rotate(query_X[spec.nope_width :], t, spec.rope_base)  # eq. 14
            q = torch.cat([query_X[: spec.nope_width], q_R])  # eq. 16
            keys = [torch.cat([w_uk[n] @ latents[s], shared_keys[s]]) for s in visible]  # eqs. 10, 17
            values = [w_uv[n] @ latents[s] for s in visible]  # eq. 11
            scores = torch.stack([key @ q for key in keys]) / math.sqrt(spec.nope_width + spec.rotary_width)
            heads.append(torch.softmax(scores, dim=0) @ torch.stack(values))  # eq. 18
        outputs.append(weights["o_proj.weight"] @ torch.cat(heads))  # eq. 19
    cached = [torch.cat(pair) for pair in zip(latents, shared_keys, strict=True)]
    return torch.stack(outputs), torch.stack(cached)


def compute_queries(weights: Mapping[str, Tensor], spec: MLASpec, x_D: Tensor) -> list[Tensor]:
    """Queries of one token before rotation, one (C + R,) for each head (eqs. 12, 13; V2-Lite has no latent here)."""
    if spec.q_latent_width:
        latent_Q = normalise(weights["q_down_proj.weight"] @ x_D, weights["q_norm.weight"])
        q = weights["q_up_proj.weight"] @ latent_Q
    else:
        q = weights["q_proj.weight"] @ x_D
    return list(q.split(spec.nope_width + spec.rotary_width))


def split_expansion(weight: Tensor, spec: MLASpec) -> tuple[list[Tensor], list[Tensor]]:
    """W_UK (C, L) and W_UV (U, L) of each head: their rows take turns in the one matrix."""
    w_uk, w_uv = [], []
    for n in range(spec.n_heads):
        first = n * (spec.nope_width + spec.value_width)
        w_uk.append(weight[first : first + spec.nope_width])
        w_uv.append(weight[first + spec.nope_width : first + spec.nope_width + spec.value_width])
    return w_uk, w_uv


def normalise(x: Tensor, gain: Tensor) -> Tensor:
    """Root-mean-square norm, with the epsilon of the released code."""
    return x / torch.sqrt(x.square().mean() + 1e-6) * gain


def rotate(x_R: Tensor, position: int, base: float) -> Tensor:
    """2104.09864 eq. 15: rotate the plane of channels (r, R/2 + r) by position * base**(-2r/R)."""
    half = len(x_R) // 2
    first, second = [], []
    for r in range(half):
        angle = position * base ** (-2 * r / len(x_R))
        first.append(x_R[r] * math.cos(angle) - x_R[half + r] * math.sin(angle))
        second.append(x_R[r] * math.sin(angle) + x_R[half + r] * math.cos(angle))
    return torch.stack(first + second) if half else x_R

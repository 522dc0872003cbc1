"""HYDRA's decoding at a gate: one step is one continuation of the same prompt."""

import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from diagnostics.bench.gate import Gate, decode_at_gate
from hydra.model.framework import Decoder, HydraModel, build_model, generate, quantise_int8
from scripts.config import TrainingConfig

Continue = Callable[[list[int], int], list[int]]


def by_decoder(model: HydraModel, spec: dict[str, Any]) -> Continue:
    """A compiled step with the model's own weights."""
    return _continue(Decoder(model, max_tokens=spec["n_prompt"] + spec["n_new"], dtype=torch.bfloat16))


def by_int8_decoder(model: HydraModel, spec: dict[str, Any]) -> Continue:
    """The same with 8-bit weights, kept only if the loss of random text stays."""
    ids_BT = torch.randint(spec["vocab_size"], (8, spec["n_tokens"] + 1), generator=torch.Generator().manual_seed(0))
    int8 = quantise_int8(model, [(ids_BT[:, :-1], ids_BT[:, 1:])])
    max_tokens = spec["n_prompt"] + spec["n_new"]
    return _continue(Decoder(model, max_tokens=max_tokens, dtype=torch.bfloat16, int8=int8))


def by_generate(model: HydraModel, spec: dict[str, Any]) -> Continue:
    """The simple way, and the reference: one call of the model for each token."""
    lowered = copy.deepcopy(model).to(torch.bfloat16)
    return lambda prompt, n_new: generate(lowered, prompt, n_new, temperature=0.0)


def _continue(decoder: Decoder) -> Continue:
    return lambda prompt, n_new: decoder.generate([prompt], n_new, temperature=0.0)[0]


VARIANTS: dict[str, Callable[[HydraModel, dict[str, Any]], Continue]] = {
    "decoder": by_decoder,
    "int8": by_int8_decoder,
    "generate": by_generate,
}
"""Ways to decode, each made from the float32 model."""


def main(spec: dict[str, Any]) -> None:
    """Decode for as long as the harness asks."""
    gate = Gate(spec)
    config = TrainingConfig.preset("debug", **spec["config"])
    model = build_model(config.model_spec(spec["vocab_size"])).eval()
    decode_at_gate(gate, spec, VARIANTS[spec["variant"]](model, spec), lambda ids_BT: model(ids_BT).logits_BTV)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

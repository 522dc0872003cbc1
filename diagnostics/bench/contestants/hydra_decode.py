"""HYDRA's decoding at a gate: one step is one continuation of the same prompt."""

import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from diagnostics.bench.gate import Gate, decode_at_gate
from hydra.model.framework import HydraModel, build_model, generate
from scripts.config import TrainingConfig

Continue = Callable[[list[int], int], list[int]]


def by_generate(model: HydraModel) -> Continue:
    """The simple way: one call of the model for each token."""
    return lambda prompt, n_new: generate(model, prompt, n_new, temperature=0.0)


VARIANTS: dict[str, Callable[[HydraModel], Continue]] = {"generate": by_generate}
"""Ways to decode, each made from a model in the dtype that was asked for."""


def main(spec: dict[str, Any]) -> None:
    """Decode for as long as the harness asks."""
    gate = Gate(spec)
    config = TrainingConfig.preset("debug", **spec["config"])
    model = build_model(config.model_spec(spec["vocab_size"])).eval()
    exact = copy.deepcopy(model)
    continue_prompt = VARIANTS[spec["variant"]](model.to(getattr(torch, spec["dtype"])))
    decode_at_gate(gate, spec, continue_prompt, lambda ids_BT: exact(ids_BT).logits_BTV)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

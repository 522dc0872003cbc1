"""HYDRA's decoding at a gate: one step is one continuation of the same prompt."""

import copy
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from diagnostics.bench.gate import Gate, decode_at_gate
from hydra.model.framework import Decoder, HydraModel, build_model, generate, quantise_int8
from scripts.config import TrainingConfig

N_TRAINED_STEPS = 25
Continue = Callable[[list[int], int], list[int]]


def by_decoder(model: HydraModel, spec: dict[str, Any]) -> Continue:
    """A compiled step with the model's own weights."""
    return _continue(Decoder(model, max_tokens=spec["n_prompt"] + spec["n_new"], dtype=torch.bfloat16))


def by_int8_decoder(model: HydraModel, spec: dict[str, Any]) -> Continue:
    """The same with 8-bit weights, after some training, and only if the loss of text that is not trained on stays."""
    rows_SBT = torch.from_numpy(np.load(spec["batches"])[: N_TRAINED_STEPS + 1].astype(np.int64))
    inputs_SBT, targets_SBT = rows_SBT[:, :, :-1], rows_SBT[:, :, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec["learning_rate"], fused=True)
    losses = []
    for inputs_BT, targets_BT in zip(inputs_SBT[:-1], targets_SBT[:-1], strict=True):
        loss = model(inputs_BT, targets_BT).losses["cross_entropy"] / targets_BT.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1, "weights that have learnt nothing have nothing to lose in 8 bits"
    int8 = quantise_int8(model, [(inputs_SBT[-1], targets_SBT[-1])])
    logging.warning("loss %.4f, with 8-bit weights %.4f nats", int8.loss_nats, int8.int8_loss_nats)
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

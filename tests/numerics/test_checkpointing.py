"""Activation checkpointing changes what is kept, and no gradient."""

import pytest
import torch

from hydra.attention import available_backends
from hydra.model.framework import Execution, build_model
from hydra.testing.specs import document_ids, tiny_model_spec


def gradients(attention: str, kept: str, kernel: str = "blocked") -> dict[str, torch.Tensor]:
    execution = Execution(attention_kernel=kernel, activation_checkpointing=kept)
    model = build_model(tiny_model_spec(attention=attention), seed=1, execution=execution)
    tokens_BT = torch.randint(61, (3, 17), generator=torch.Generator().manual_seed(0))
    model(tokens_BT, tokens_BT.roll(-1, 1), document_ids(9, 8).expand(3, -1)).losses["cross_entropy"].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kept", ["selective", "full"])
@pytest.mark.parametrize("attention", available_backends())
def test_gradients_are_the_same_bit_for_bit(attention: str, kept: str) -> None:
    expected, got = gradients(attention, "none"), gradients(attention, kept)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        assert torch.equal(gradient, expected[name]), name


def test_less_is_kept() -> None:
    from hydra.runtime.memory.tracker import Rehearsal

    def kept_bytes(kept: str) -> int:
        model = build_model(
            tiny_model_spec(attention="gqa", n_layers=4), execution=Execution(activation_checkpointing=kept)
        )
        tokens_BT = torch.zeros(2, 64, dtype=torch.int64)
        rehearsal = Rehearsal()
        with rehearsal:
            loss = model(tokens_BT, tokens_BT).losses["cross_entropy"]
        alive = sum(block.n_bytes for block in rehearsal.blocks if block.died_at is None)
        loss.backward()
        return alive

    assert kept_bytes("full") < kept_bytes("selective") < kept_bytes("none")

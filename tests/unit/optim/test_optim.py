"""Schedules at their corners, and each parameter in exactly one group."""

import itertools

import pytest
import torch
from torch import nn

from hydra.errors import CheckpointError
from hydra.optim import (
    build_parameter_groups,
    cosine,
    load_optimizer_tensors,
    optimizer_tensors,
    warmup_stable_decay,
)


def test_warmup_stable_decay_corners() -> None:
    shape = {"max_steps": 100, "warmup_steps": 9, "decay_fraction": 0.4, "final_fraction": 0.1}
    rate = [warmup_stable_decay(step, **shape) for step in range(101)]
    assert rate[0] == pytest.approx(0.1)
    assert rate[9] == 1.0
    assert rate[10:61] == [1.0] * 51
    assert rate[61] < 1.0
    assert rate[100] == pytest.approx(0.1)
    falls = [before - after for before, after in itertools.pairwise(rate[60:])]
    assert falls == pytest.approx([0.9 / 40] * 40)


def test_no_decay_and_no_warmup() -> None:
    shape = {"max_steps": 10, "warmup_steps": 0, "decay_fraction": 0.0, "final_fraction": 0.0}
    assert [warmup_stable_decay(step, **shape) for step in range(10)] == [1.0] * 10


def test_a_run_shorter_than_warmup_and_fall_together() -> None:
    shape = {"max_steps": 10, "warmup_steps": 9, "decay_fraction": 0.5, "final_fraction": 0.0}
    rate = [warmup_stable_decay(step, **shape) for step in range(10)]
    assert rate[4:] == pytest.approx([0.5, 0.6, 0.7 * 0.8, 0.8 * 0.6, 0.9 * 0.4, 0.2])


def test_cosine_corners() -> None:
    shape = {"max_steps": 110, "warmup_steps": 10, "final_fraction": 0.1}
    assert cosine(10, **shape) == 1.0
    assert cosine(60, **shape) == pytest.approx(0.55)
    assert cosine(110, **shape) == pytest.approx(0.1)
    assert cosine(0, **shape) == pytest.approx(1 / 11)


def test_each_parameter_is_in_exactly_one_group() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 7, bias=False))
    model[3].weight = model[0].weight  # a tied head counts once
    decayed, plain = build_parameter_groups(model, weight_decay=0.1)
    assert [decayed["weight_decay"], plain["weight_decay"]] == [0.1, 0.0]
    grouped = [*decayed["params"], *plain["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert {id(parameter) for parameter in plain["params"]} == {id(model[1].bias), *map(id, model[2].parameters())}
    torch.optim.AdamW([decayed, plain], lr=1e-3)


def test_optimizer_state_goes_round_and_must_fit() -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    model, optimizer = build()
    for _ in range(3):
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
    tensors = optimizer_tensors(model, optimizer)
    other_model, other_optimizer = build()
    load_optimizer_tensors(other_model, other_optimizer, tensors)
    other_tensors = optimizer_tensors(other_model, other_optimizer)
    assert other_tensors.keys() == tensors.keys()
    assert all(torch.equal(other_tensors[key], tensor) for key, tensor in tensors.items())
    incomplete = {key: tensor for key, tensor in tensors.items() if key != "0.bias/exp_avg"}
    for wrong in (incomplete, {**tensors, "2.weight/exp_avg": torch.ones(1)}):
        with pytest.raises(CheckpointError, match="names do not"):
            load_optimizer_tensors(other_model, other_optimizer, wrong)

import math
import re

import pytest
import torch

from hydra.attention import available_backends
from hydra.model.framework import ModelSpec, build_model
from hydra.model.framework.initialisation import INITIALISATION, find_rule, initialise
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401
from hydra.testing.specs import tiny_model_spec

ALL_SPECS = [
    tiny_model_spec(attention=attention, feed_forward=feed_forward, tie_embeddings=tied)
    for attention in available_backends()
    for feed_forward, tied in (("swiglu", True), ("squared_relu", False))
]


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda spec: f"{spec.attention}-{spec.feed_forward}")
def test_every_parameter_is_filled_by_exactly_one_row(spec: ModelSpec, nan_poisoned_memory: None) -> None:  # noqa: F811
    model = build_model(spec)
    for name, parameter in model.named_parameters():
        assert sum(re.fullmatch(pattern, name) is not None for pattern, _ in INITIALISATION) == 1, name
        assert parameter.isfinite().all(), name


def test_every_row_is_used() -> None:
    names = [name for spec in ALL_SPECS for name, _ in build_model(spec).named_parameters()]
    for pattern, _ in INITIALISATION:
        assert any(re.fullmatch(pattern, name) for name in names), pattern


def test_a_parameter_without_a_row_or_with_two_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="got 0 for surprise"):
        find_rule("surprise")
    model = torch.nn.ModuleDict({"surprise": torch.nn.Linear(2, 2)})
    with pytest.raises(AssertionError, match=r"got 0 for surprise\.weight"):
        initialise(model, 0, tiny_model_spec())
    table = (*INITIALISATION, (r".*\.weight", INITIALISATION[0][1]))
    monkeypatch.setattr("hydra.model.framework.initialisation.INITIALISATION", table)
    with pytest.raises(AssertionError, match=r"got 2 for embedding\.weight"):
        find_rule("embedding.weight")


def test_values_depend_on_seed_and_name_only() -> None:
    """Not on what else the model holds, so that variants start from the same values wherever they can."""
    small, large = build_model(tiny_model_spec()), build_model(tiny_model_spec(n_layers=3, tie_embeddings=False))
    theirs = dict(large.named_parameters())
    for name, parameter in small.named_parameters():
        if not re.search(r"(o_proj|down)\.weight$", name):  # scaled by depth
            assert torch.equal(parameter, theirs[name]), name
    again, other = build_model(tiny_model_spec()), build_model(tiny_model_spec(), seed=1)
    assert torch.equal(again.embedding.weight, small.embedding.weight)
    assert not torch.equal(other.embedding.weight, small.embedding.weight)
    assert not torch.equal(theirs["blocks.0.attention.q_proj.weight"], theirs["blocks.1.attention.q_proj.weight"])


def test_lower_precision_starts_from_the_same_values_rounded() -> None:
    exact, rounded = build_model(tiny_model_spec()), build_model(tiny_model_spec(), dtype=torch.bfloat16)
    for ours, theirs in zip(rounded.parameters(), exact.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16())


def test_building_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = build_model(tiny_model_spec(attention="ccgqa"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    second = build_model(tiny_model_spec(attention="ccgqa"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("attention", available_backends())
def test_with_zero_init_every_block_starts_as_the_identity(attention: str) -> None:
    model = build_model(tiny_model_spec(attention=attention, zero_init=True))
    inputs_BT = torch.arange(5)[None]
    expected = model.final_norm(model.embedding(inputs_BT)) @ model.head_weight.T
    assert torch.equal(model(inputs_BT).logits_BTV, expected)


@pytest.mark.parametrize(("attention", "options"), [("ccgqa", {}), ("mla", {"q_latent_width": 48})])
def test_standard_deviations(attention: str, options: dict[str, int]) -> None:
    model = build_model(
        tiny_model_spec(
            d_model=128, n_heads=8, d_feed_forward=256, n_layers=8, attention=attention, attention_options=options
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down.weight")):
            expected = 0.02 / math.sqrt(16)
        elif name.endswith(("bias", "temp")):
            assert (parameter == 0).all(), name
            continue
        elif "norm" in name:
            assert (parameter == 1).all(), name
            continue
        else:
            expected = 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.15), name
        assert abs(parameter.mean().item()) <= 0.2 * expected, name

import pytest
import torch

from hydra.attention import available_backends
from hydra.errors import ConfigError
from hydra.model.framework import generate
from hydra.model.framework.generation import choose_token
from hydra.testing.specs import build_random_model

PROMPT = [3, 14, 15, 9, 26]


@pytest.mark.parametrize("attention", available_backends())
def test_greedy_is_the_argmax_of_full_forward_passes(attention: str) -> None:
    model = build_random_model(attention=attention)
    ids = list(PROMPT)
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids])).logits_BTV[0, -1].argmax()))
    assert generate(model, PROMPT, 12, temperature=0.0) == ids[len(PROMPT) :]
    assert len(set(ids)) > 3
    assert generate(model, PROMPT, 12, temperature=5.0, top_k=1, seed=4) == ids[len(PROMPT) :]


@pytest.mark.parametrize("attention", available_backends())
def test_samples_depend_on_the_seed_and_on_nothing_global(attention: str) -> None:
    model = build_random_model(torch.float32, attention=attention)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = generate(model, PROMPT, 20, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert generate(model, PROMPT, 20, seed=7) == first
    assert generate(model, PROMPT, 20, seed=8) != first
    assert len(first) == 20
    assert all(0 <= token < 61 for token in first)


def draws(temperature: float, top_k: int | None) -> torch.Tensor:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    uniforms = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = choose_token(probabilities.log().expand(20000, 4), temperature, top_k, uniforms)
    return torch.bincount(drawn.flatten(), minlength=4) / 20000


def test_frequencies_follow_the_distribution() -> None:
    torch.testing.assert_close(draws(1.0, None), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.015, rtol=0)
    torch.testing.assert_close(draws(1.0, 2), torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.015, rtol=0)
    torch.testing.assert_close(draws(1.0, 9), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.015, rtol=0)
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(draws(0.5, None), squared / squared.sum(), atol=0.015, rtol=0)


def test_nothing_to_add() -> None:
    assert generate(build_random_model(), PROMPT, 0) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_ids": []}, "prompt_ids must be at least one id"),
        ({"prompt_ids": [61]}, "id from 0 to 60"),
        ({"n_new_tokens": -1}, "n_new_tokens must not be negative"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(build_random_model(), **{"prompt_ids": PROMPT, "n_new_tokens": 3, **arguments})  # type: ignore[arg-type]

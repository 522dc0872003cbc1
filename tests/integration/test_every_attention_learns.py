"""A tiny model over each attention backend learns to copy, and then decodes what it has learnt."""

import pytest
import torch

from hydra.attention import available_backends
from hydra.model.framework import Decoder, build_model, generate
from hydra.testing.specs import tiny_model_spec


def repeated_rows(generator: torch.Generator, n_rows: int) -> torch.Tensor:
    """Two random tokens, again and again: what follows is the token of two places before."""
    return torch.randint(61, (n_rows, 2), generator=generator).repeat(1, 9)


@pytest.mark.parametrize("attention", available_backends())
def test_a_tiny_model_learns_to_copy_and_decodes_it(attention: str) -> None:
    model = build_model(tiny_model_spec(attention=attention))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        rows_BT = repeated_rows(generator, 16)
        output = model(rows_BT[:, :-1], rows_BT[:, 1:])
        optimizer.zero_grad()
        (output.losses["cross_entropy"] / output.n_valid_tokens).backward()
        optimizer.step()
    prompts = [row[:7].tolist() for row in repeated_rows(generator, 3)]
    expected = [[prompt[1 - index % 2] for index in range(8)] for prompt in prompts]
    generated = [generate(model, prompt, 8, temperature=0.0) for prompt in prompts]
    assert output.losses["cross_entropy"] / output.n_valid_tokens < 3.0  # log(61) is 4.1
    if attention != "lightning":  # a sum over the past takes longer to learn to copy
        assert generated == expected
    decoder = Decoder(model, max_tokens=16, n_streams=3, implementation="reference")
    assert decoder.generate(prompts, 8, temperature=0.0) == generated

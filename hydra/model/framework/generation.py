"""Sampling from a model, token by token, through its cache.

B batch, T tokens, V vocabulary.
"""

import torch
from torch import Tensor

from hydra.errors import ConfigError
from hydra.model.framework.model import HydraModel


@torch.inference_mode()
def generate(
    model: HydraModel,
    prompt_ids: list[int],
    n_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Continue a prompt.

    Args:
        model: in any mode and dtype.
        prompt_ids: at least one token id below the model's vocab_size.
        n_new_tokens: how many tokens to add.
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: sample among the k most likely tokens only; None for all of them.
        seed: of a generator of its own: the global random state is neither read nor changed.
    Returns:
        The new tokens, without the prompt.
    Raises:
        ConfigError: an argument out of range.
    """
    vocab_size = model.spec.vocab_size
    if not prompt_ids or not all(0 <= token < vocab_size for token in prompt_ids):
        raise ConfigError(f"prompt_ids must be at least one id from 0 to {vocab_size - 1}, but got {prompt_ids}")
    if n_new_tokens < 0:
        raise ConfigError(f"n_new_tokens must not be negative, but got {n_new_tokens=}")
    if not 0.0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be 0 (greedy) or a positive number, but got {temperature=}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k must be at least 1, or None for all tokens, but got {top_k=}")

    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    cache = model.new_cache(batch_size=1, max_tokens=len(prompt_ids) + n_new_tokens)
    next_ids_BT = torch.tensor([prompt_ids], device=device)
    new_ids = []
    for _ in range(n_new_tokens):
        logits_BTV = model(next_ids_BT, cache=cache).logits_BTV
        next_ids_BT = choose_token(logits_BTV[:, -1], temperature, top_k, generator)
        new_ids.append(int(next_ids_BT))
    return new_ids


def choose_token(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """Draw one token for each row, (B, 1); see generate."""
    if temperature == 0.0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        top = logits_BV.topk(top_k, dim=-1)
        chosen = torch.multinomial(top.values.softmax(dim=-1), 1, generator=generator)
        return top.indices.gather(-1, chosen)
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator)

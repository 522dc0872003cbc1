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
    check_sampling(model.spec.vocab_size, [prompt_ids], n_new_tokens, temperature, top_k)
    device = model.embedding.weight.device
    uniforms_T1 = draw_uniforms(n_new_tokens, [seed], device)
    cache = model.new_cache(batch_size=1, max_tokens=len(prompt_ids) + n_new_tokens)
    next_ids_BT = torch.tensor([prompt_ids], device=device)
    new_ids = []
    for uniforms_B in uniforms_T1:
        logits_BTV = model(next_ids_BT, cache=cache).logits_BTV
        next_ids_BT = choose_token(logits_BTV[:, -1], temperature, top_k, uniforms_B)[:, None]
        new_ids.append(int(next_ids_BT))
    return new_ids


def check_sampling(
    vocab_size: int, prompts: list[list[int]], n_new_tokens: int, temperature: float, top_k: int | None
) -> None:
    """Return if tokens can be drawn so; ConfigError otherwise. See generate."""
    for prompt_ids in prompts:
        if not prompt_ids or not all(0 <= token < vocab_size for token in prompt_ids):
            raise ConfigError(f"prompt_ids must be at least one id from 0 to {vocab_size - 1}, but got {prompt_ids}")
    if n_new_tokens < 0:
        raise ConfigError(f"n_new_tokens must not be negative, but got {n_new_tokens=}")
    if not 0.0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be 0 (greedy) or a positive number, but got {temperature=}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k must be at least 1, or None for all tokens, but got {top_k=}")


def draw_uniforms(n_tokens: int, seeds: list[int], device: torch.device) -> Tensor:
    """Numbers in [0, 1) that decide n_tokens draws of each stream, (T, B); a stream's depend on its seed only."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    streams = [torch.rand(n_tokens, dtype=torch.float64, generator=generator) for generator in generators]
    return torch.stack(streams, dim=1).to(device)


def choose_token(logits_BV: Tensor, temperature: float, top_k: int | None, uniforms_B: Tensor) -> Tensor:
    """One token for each row, (B,): where the row's cumulative probability passes its uniform number; see generate."""
    if temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.double() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        top = logits_BV.topk(top_k, dim=-1)
        return top.indices.gather(-1, _pass(top.values, uniforms_B)[:, None])[:, 0]
    return _pass(logits_BV, uniforms_B)


def _pass(logits_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    cumulative_BV = logits_BV.softmax(dim=-1).cumsum(dim=-1)
    # Scaled by the last sum, which rounding may leave below 1, so that a token of the row is always found.
    n_below_B = (cumulative_BV <= uniforms_B[:, None] * cumulative_BV[:, -1:]).sum(dim=-1)
    return n_below_B.clamp(max=logits_BV.shape[-1] - 1)

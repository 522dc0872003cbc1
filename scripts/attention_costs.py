"""What each arm of a comparison costs by the length of its rows: training, prefill and decode speed, memory, cache.

Arms take turns, and of several rounds the fastest counts, so that a machine that is busy for a while slows none of them
down alone. Everything is measured as written, not compiled.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from hydra.model.framework import HydraModel, build_model
from hydra.runtime import workspace_root
from hydra.runtime.choices import resolve, set_up_torch
from hydra.runtime.memory.plan import Rung
from scripts.comparison import ComparisonConfig
from scripts.config import TrainingConfig
from scripts.planning import predict_peak
from scripts.preparation import execution_of
from scripts.trainer import COMPILE_CACHE

TRAINING_TOKENS = 2048
"""Tokens of the batch whose forward and backward pass is timed; one row where that is longer."""
N_DECODED = 8
N_ROUNDS = 3


def measure_costs(
    config: ComparisonConfig, known: Mapping[str, Any], comparisons: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """All costs so far after each length, by length and arm: what `known` holds is not measured again.

    The arms are those of the first comparison that has any beside the baseline.
    """
    arms = next(found["arms"] for found in comparisons.values() if len(found["arms"]) > 1)
    costs = dict(known)
    for n_tokens in config.cost_lengths:
        if str(n_tokens) not in costs:
            configs = {
                arm["name"]: config.training_config(
                    arm["attention"],
                    d_feed_forward=arm["d_feed_forward"],
                    context_length=n_tokens,
                    compile_from_step=None,  # so that speed, kernels and memory are those of one execution
                    batch_size=1,
                    micro_batch_size=1,
                )
                for arm in arms
            }
            costs[str(n_tokens)] = measure_length(configs, n_tokens)
        yield costs


def measure_length(configs: Mapping[str, TrainingConfig], n_tokens: int) -> dict[str, dict[str, float]]:
    """Of each arm, by name: tokens per second, milliseconds per decoded token, bytes."""
    first = next(iter(configs.values()))
    choices, _ = resolve(**first.asked_choices())
    set_up_torch(choices, first.seed, workspace_root() / first.data_dir / COMPILE_CACHE)
    dtype, device = getattr(torch, choices.dtype), torch.device(choices.device)
    models = {
        name: build_model(config.model_spec(), device=device, execution=execution_of(choices)).to(dtype)
        for name, config in configs.items()
    }
    n_rows = max(1, TRAINING_TOKENS // n_tokens)
    ids_BT = torch.randint(first.vocab_size, (n_rows, n_tokens + 1), generator=torch.Generator().manual_seed(0))
    ids_BT = ids_BT.to(device)
    best: dict[str, dict[str, float]] = {name: {} for name in models}
    for _ in range(N_ROUNDS):
        for name, model in models.items():
            for what, seconds in _time_model(model, ids_BT).items():
                best[name][what] = min(seconds, best[name].get(what, seconds))
    rung = Rung(n_rows, "none", False)
    return {
        name: {
            "training_tokens_per_s": n_rows * n_tokens / best[name]["training"],
            "prefill_tokens_per_s": n_tokens / best[name]["prefill"],
            "decode_ms_per_token": 1000 * best[name]["decode"] / N_DECODED,
            "peak_memory_bytes": predict_peak(
                dataclasses.replace(config, batch_size=n_rows, micro_batch_size=n_rows),
                choices,
                config.vocab_size,
                rung,
            ).total,
            **_cache_bytes(models[name], n_tokens),
        }
        for name, config in configs.items()
    }


def _time_model(model: HydraModel, ids_BT: torch.Tensor) -> dict[str, float]:
    """Seconds of a training pass over all rows, of a prefill of one row, and of N_DECODED tokens behind it."""
    inputs_BT, targets_BT = ids_BT[:, :-1], ids_BT[:, 1:]

    def train() -> None:
        output = model(inputs_BT, targets_BT)
        sum(output.losses.values()).backward()
        model.zero_grad(set_to_none=True)

    seconds = {"training": _time(train, inputs_BT.device)}
    with torch.no_grad():
        cache = model.new_cache(1, inputs_BT.shape[1] + N_DECODED)
        seconds["prefill"] = _time(lambda: model(inputs_BT[:1], cache=cache), inputs_BT.device)

        def decode() -> None:
            for _ in range(N_DECODED):
                model(inputs_BT[:1, :1], cache=cache)

        seconds["decode"] = _time(decode, inputs_BT.device)
    return seconds


def _time(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _cache_bytes(model: HydraModel, n_tokens: int) -> dict[str, float]:
    """Of one row: what the tensors of a cache take, and what the layers' formulas say."""
    cache = model.new_cache(1, n_tokens)
    tensors = [tensor for layer in cache.layers for tensor in (*layer.token_tensors(), *layer.state_tensors())]
    measured = sum(tensor.nbytes for tensor in tensors)
    return {"cache_bytes": measured, "cache_bytes_by_formula": model.cache_bytes(n_tokens)}

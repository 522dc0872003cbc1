"""How every parameter starts: one table, each parameter matched by exactly one row.

A parameter's first values depend on the seed and its name, never on the order of construction, the device, or what else
the model holds. Standard deviation 0.02, and for what adds to the residual stream of L layers 0.02 / sqrt(2 L) (GPT-2)
or zero; convolutions 0.02 with bias 0 as in the released ZAYA code; the temperature exp(temp) of ccgqa starts at 1.

In a researcher's own class torch's linear layers and convolutions start as those of backends do, o_proj included;
parameters of its own keep what its __init__ gave them; reset_parameters(), if it has that, comes last and has its way.
"""

import hashlib
import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hydra.attention.code import load_class
from hydra.attention.custom import CustomAttention
from hydra.model.framework.spec import ModelSpec

STANDARD_DEVIATION = 0.02

Rule = Callable[[Tensor, torch.Generator, ModelSpec], None]
"""Fills a float32 CPU tensor, given the parameter's generator and what the model is."""


def fill_normal(values: Tensor, generator: torch.Generator, spec: ModelSpec) -> None:
    """Normal with the standard deviation of the file."""
    values.normal_(0.0, STANDARD_DEVIATION, generator=generator)


def fill_residual(values: Tensor, generator: torch.Generator, spec: ModelSpec) -> None:
    """Zeros if the spec says so; else normal, scaled down so that the stream's variance does not grow with depth."""
    if spec.zero_init:
        values.zero_()
    else:
        values.normal_(0.0, STANDARD_DEVIATION / math.sqrt(2 * spec.n_layers), generator=generator)


def fill_zeros(values: Tensor, generator: torch.Generator, spec: ModelSpec) -> None:
    """Zeros."""
    values.zero_()


def fill_ones(values: Tensor, generator: torch.Generator, spec: ModelSpec) -> None:
    """Ones."""
    values.fill_(1.0)


INITIALISATION: tuple[tuple[str, Rule], ...] = (
    (r"embedding\.weight", fill_normal),
    (r"head\.weight", fill_normal),
    (r"final_norm\.weight", fill_ones),
    (r"blocks\.\d+\.(attention|feed_forward)_norm\.weight", fill_ones),
    (r"blocks\.\d+\.attention\.(q|k|v|v_previous)_proj\.weight", fill_normal),
    (r"blocks\.\d+\.attention\.(q|kv)_(down|up)_proj\.weight", fill_normal),
    (r"blocks\.\d+\.attention\.(q|kv)_norm\.weight", fill_ones),
    (r"blocks\.\d+\.attention\.gate(|_down|_up)_proj\.weight", fill_normal),
    (r"blocks\.\d+\.attention\.norm\.weight", fill_ones),
    (r"blocks\.\d+\.attention\.o_proj\.weight", fill_residual),
    (r"blocks\.\d+\.attention\.conv[01]\.weight", fill_normal),
    (r"blocks\.\d+\.attention\.conv[01]\.bias", fill_zeros),
    (r"blocks\.\d+\.attention\.temp", fill_zeros),
    (r"blocks\.\d+\.feed_forward\.(gate|up)\.weight", fill_normal),
    (r"blocks\.\d+\.feed_forward\.down\.weight", fill_residual),
)


def find_rule(name: str) -> Rule:
    """The one rule of the table for the parameter of this name."""
    rules = [rule for pattern, rule in INITIALISATION if re.fullmatch(pattern, name)]
    assert len(rules) == 1, f"a parameter must have one row in INITIALISATION, but got {len(rules)} for {name}"
    return rules[0]


def build_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the parameter's name only."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.no_grad()
def initialise(model: nn.Module, seed: int, spec: ModelSpec) -> None:
    """Fill every parameter of the model by its rule. Drawn in float32 on the CPU, then rounded and moved."""
    customs = {path: layer for path, layer in model.named_modules() if isinstance(layer, CustomAttention)}
    for path, layer in customs.items():
        initialise_custom(layer, path, seed, spec)
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(f"{path}." for path in customs)):
            continue
        values = torch.empty(parameter.shape, dtype=torch.float32)
        find_rule(name)(values, build_generator(seed, name), spec)
        parameter.copy_(values)


@torch.no_grad()
def initialise_custom(layer: CustomAttention, path: str, seed: int, spec: ModelSpec) -> None:
    """Fill a researcher's layer, which the model has at `path`; see the top of the file.

    Its __init__ is run once more, where it has memory and with torch's generator seeded for this layer.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(build_generator(seed, path).initial_seed())
        own = load_class(layer.spec.name, layer.spec.sha256)(layer.spec)
        for name, module in own.named_modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                rule = fill_residual if name.split(".")[-1] == "o_proj" else fill_normal
                rule(module.weight, build_generator(seed, f"{path}.{name}.weight"), spec)
                if module.bias is not None:
                    module.bias.zero_()
        if hasattr(own, "reset_parameters"):
            own.reset_parameters()
    values = dict(own.named_parameters())
    for name, parameter in layer.custom.named_parameters():
        parameter.copy_(values[name])

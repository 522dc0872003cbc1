"""Which parameter is treated how: each stands in exactly one group, and each group has one purpose."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass
class ParameterGroups:
    """Parameters by what they are, named."""

    hidden: dict[str, nn.Parameter] = field(default_factory=dict)
    """Matrices between activations, inside the blocks: what Muon is made for."""
    tables: dict[str, nn.Parameter] = field(default_factory=dict)
    """Embedding and head, whose rows belong to tokens, and convolution kernels."""
    vectors: dict[str, nn.Parameter] = field(default_factory=dict)
    """Gains, biases, temperatures."""


def group_parameters(named: Mapping[str, nn.Parameter]) -> ParameterGroups:
    """Sort parameters by name and number of axes.

    Sparing vectors from weight decay is the custom of the field since GPT-2: a gain of 1 or a temperature has no reason
    to be drawn to 0. That tables are not orthogonalised is Muon's own rule (Jordan et al. 2024).
    """
    groups = ParameterGroups()
    for name, parameter in named.items():
        if parameter.ndim < 2:
            groups.vectors[name] = parameter
        elif name.startswith("blocks.") and parameter.ndim == 2:
            groups.hidden[name] = parameter
        else:
            groups.tables[name] = parameter
    return groups

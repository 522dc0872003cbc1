"""Which parameter is treated how: each stands in exactly one group."""

from typing import Any

from torch import nn


def build_parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: matrices (two or more axes) with `weight_decay`, and gains, biases, temperatures.

    Decay is decoupled from the gradient (Loshchilov and Hutter, arXiv 1711.05101). Sparing vectors is the custom of
    the field since GPT-2: a gain of 1 or a temperature has no reason to be drawn to 0.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]

"""Weights in 8 bits for decoding: one symmetric scale for each output of a matrix, kept only if the loss stays.

B batch, T tokens, O outputs, I inputs.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hydra.attention.custom import CustomAttention
from hydra.errors import ConfigError, QuantisationError
from hydra.model.framework.model import HydraModel

logger = logging.getLogger(__name__)

ZERO_POINT = 128
"""What is added to a weight of -127 to 127 so that it is stored without a sign."""


@dataclasses.dataclass(frozen=True)
class Int8Matrix:
    """W = scales (weight - ZERO_POINT)."""

    weight_OI: Tensor
    """uint8."""
    scales_O: Tensor
    """float32."""

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The matrix it stands for, (O, I)."""
        return ((self.weight_OI.float() - ZERO_POINT) * self.scales_O[:, None]).to(dtype)


@dataclasses.dataclass(frozen=True)
class Int8Weights:
    """The matrices of a model that passed the gate of quantise_int8."""

    matrices: Mapping[str, Int8Matrix]
    """By the name of their module: every linear layer, the head too where it is the embedding's own matrix."""
    loss_nats: float
    """Mean loss for each token of the batches with the model's own weights."""
    int8_loss_nats: float
    """The same with 8-bit weights."""


def quantise_int8(
    model: HydraModel, batches: Iterable[tuple[Tensor, Tensor]], *, max_increase_nats: float = 0.01
) -> Int8Weights:
    """Round every matrix of the model to 8 bits, if that costs little on the given text.

    The embedding is looked up, not multiplied: it costs no time and stays as it is.

    Args:
        model: stays as it is.
        batches: inputs_BT and targets_BT as the model takes them; some thousand tokens of validation text.
        max_increase_nats: how much the mean loss for each token may rise.
    Raises:
        QuantisationError: it rises by more, or is not finite.
        ConfigError: the batches hold no target.
    """
    matrices = {name: round_to_int8(weight_OI) for name, weight_OI in find_matrices(model).items()}
    rounded = build_dequantised(model, matrices)
    sums, n_targets = [0.0, 0.0], 0
    for inputs_BT, targets_BT in batches:
        for index, candidate in enumerate((model, rounded)):
            output = _evaluate(candidate, inputs_BT, targets_BT)
            sums[index] += float(output[0])
        n_targets += output[1]
    if n_targets == 0:
        raise ConfigError("batches must hold at least one target that counts, but got none; pass validation batches")
    weights = Int8Weights(matrices, sums[0] / n_targets, sums[1] / n_targets)
    increase = weights.int8_loss_nats - weights.loss_nats
    # Written so that a NaN is refused.
    if not increase <= max_increase_nats or not math.isfinite(increase):
        raise QuantisationError(
            f"8-bit weights must raise the loss by at most {max_increase_nats} nats per token, but it went from "
            f"{weights.loss_nats:.4f} to {weights.int8_loss_nats:.4f} over {n_targets} tokens; decode with the model's "
            "own weights, or allow more with max_increase_nats"
        )
    logger.info("8-bit weights change the loss by %+.5f nats over %d tokens", increase, n_targets)
    return weights


def find_matrices(model: HydraModel) -> dict[str, Tensor]:
    """Every matrix that a decode step multiplies by a linear layer of ours, by the name of its module.

    What a researcher's own class does with its layers is not known: they are left to it.
    """
    customs = tuple(f"{name}." for name, layer in model.named_modules() if isinstance(layer, CustomAttention))
    layers = {
        name: layer.weight
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not name.startswith(customs)
    }
    return {**layers, "head": model.head_weight}


@torch.no_grad()
def round_to_int8(weight_OI: Tensor) -> Int8Matrix:
    """To the nearest of 255 numbers, evenly spaced from minus to plus the row's largest magnitude."""
    weight_OI = weight_OI.float()
    scales_O = (weight_OI.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    rounded_OI = (weight_OI / scales_O[:, None]).round().nan_to_num(0).clamp(-127, 127) + ZERO_POINT
    return Int8Matrix(rounded_OI.to(torch.uint8), scales_O)


def build_dequantised(model: HydraModel, matrices: Mapping[str, Int8Matrix]) -> HydraModel:
    """The model with rounded matrices, in its own dtype; what is not rounded is shared with it."""
    with torch.device("meta"):
        rounded = HydraModel(dataclasses.replace(model.spec, tie_embeddings=False), model.execution)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    for name, matrix in matrices.items():
        dtype = model.head_weight.dtype if name == "head" else state[f"{name}.weight"].dtype
        state[f"{name}.weight"] = matrix.dequantise(dtype)
    rounded.load_state_dict(state, assign=True)
    return rounded


@torch.no_grad()
def _evaluate(model: HydraModel, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[float, int]:
    output = model(inputs_BT, targets_BT)
    assert output.n_valid_tokens is not None
    return float(output.losses["cross_entropy"]), int(output.n_valid_tokens)

"""An optimizer's state as flat named tensors, and back: what a checkpoint without pickle can hold."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from hydra.errors import CheckpointError


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every state tensor under `<parameter name>/<slot>`, as `blocks.0.norm.weight/exp_avg`."""
    return {
        f"{name}/{slot}": tensor
        for name, parameter in model.named_parameters()
        for slot, tensor in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, on each parameter's device.

    Raises:
        CheckpointError: a parameter lacks a slot that another has, or a tensor belongs to no parameter.
    """
    parameters = dict(model.named_parameters())
    slots = {key.rpartition("/")[2] for key in tensors}
    expected = {f"{name}/{slot}" for name in parameters for slot in slots}
    if set(tensors) != expected:
        names = sorted(set(tensors) ^ expected)
        raise CheckpointError(f"an optimizer's state must fit its model, but {len(names)} names do not: {names[:3]}")
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        optimizer.state[parameters[name]][slot] = tensor.to(parameters[name].device)

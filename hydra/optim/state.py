"""State of optimizers as flat named tensors, and back: what a checkpoint without pickle can hold."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from hydra.errors import CheckpointError


def optimizer_tensors(named: Mapping[str, nn.Parameter], optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Every state tensor under `<parameter name>/<slot>`, as `blocks.0.norm.weight/exp_avg`."""
    return {
        f"{name}/{slot}": tensor
        for name, parameter in named.items()
        for optimizer in optimizers
        if parameter in optimizer.state
        for slot, tensor in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(
    named: Mapping[str, nn.Parameter], optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, on each parameter's device.

    Raises:
        CheckpointError: a parameter lacks a slot that others of its optimizer have, or a tensor is of no parameter.
    """
    expected = set()
    for optimizer in optimizers:
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        names = {name for name, parameter in named.items() if id(parameter) in own}
        slots = {key.rpartition("/")[2] for key in tensors if key.rpartition("/")[0] in names}
        expected |= {f"{name}/{slot}" for name in names for slot in slots}
        for key in expected & set(tensors):
            name, _, slot = key.rpartition("/")
            if name in names:
                optimizer.state[named[name]][slot] = tensors[key].to(named[name].device)
    if set(tensors) != expected:
        wrong = sorted(set(tensors) ^ expected)
        raise CheckpointError(f"an optimizer's state must fit its model, but {len(wrong)} names do not: {wrong[:3]}")

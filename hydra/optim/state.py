"""An optimizer's state as flat named tensors, and back: what a checkpoint without pickle can hold."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every state tensor under `<parameter name>/<slot>`, as `blocks.0.norm.weight/exp_avg`."""
    return {
        f"{name}/{slot}": tensor
        for name, parameter in model.named_parameters()
        for slot, tensor in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, on each parameter's device. Names must fit the model's."""
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        optimizer.state[parameters[name]][slot] = tensor.to(parameters[name].device)

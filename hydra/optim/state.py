"""State of optimizers as flat named tensors, and back: what a checkpoint without pickle can hold."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hydra.errors import CheckpointError


def optimizer_tensors(named: Mapping[str, nn.Parameter], optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Every state tensor under `<parameter name>/<slot>`, as `blocks.0.norm.weight/exp_avg`.

    What torchao keeps in 8 bits is three tensors, under `<parameter name>/<slot>/codes`, `.../scale`, `.../qmap`.
    """
    return {
        f"{name}/{slot}{part}": value
        for name, parameter in named.items()
        for optimizer in optimizers
        if parameter in optimizer.state
        for slot, tensor in optimizer.state[parameter].items()
        for part, value in _split(tensor).items()
    }


def load_optimizer_tensors(
    named: Mapping[str, nn.Parameter], optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, on each parameter's device.

    Raises:
        CheckpointError: a parameter lacks a slot that others of its optimizer have, or a tensor is of no parameter.
    """
    stored: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, slot, part = (*key.split("/", 2), "")[:3]
        stored.setdefault((name, slot), {})[part] = tensor
    expected = set()
    for optimizer in optimizers:
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        names = {name for name, parameter in named.items() if id(parameter) in own}
        slots = {slot for name, slot in stored if name in names}
        expected |= {(name, slot) for name in names for slot in slots}
        for (name, slot), parts in stored.items():
            if name in names:
                parts = {part: tensor.to(named[name].device) for part, tensor in parts.items()}
                optimizer.state[named[name]][slot] = _join(f"{name}/{slot}", parts)
    if set(stored) != expected:
        wrong = sorted("/".join(key) for key in set(stored) ^ expected)
        raise CheckpointError(f"an optimizer's state must fit its model, but {len(wrong)} names do not: {wrong[:3]}")


def _split(tensor: Tensor) -> dict[str, Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        return {"": tensor}
    names, _ = tensor.__tensor_flatten__()
    return {f"/{name}": getattr(tensor, name) for name in names}


def _join(key: str, parts: dict[str, Tensor]) -> Tensor:
    if set(parts) == {""}:
        return parts[""]
    if set(parts) != {"codes", "scale", "qmap"}:
        raise CheckpointError(f"an optimizer's state must be whole, but {key} has {', '.join(sorted(parts))}")
    from torchao.optim.subclass_8bit import OptimState8bit  # imports torch's compiler

    return OptimState8bit(**parts, signed=bool(parts["qmap"].min() < 0), dtype=parts["qmap"].dtype)

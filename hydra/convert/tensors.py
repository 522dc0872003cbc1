"""Weights of two formats, paired by name: each tensor of theirs is one or several of ours, and is used exactly once."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hydra.errors import CheckpointError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_NAMES = 8
"""How many names an error lists."""


@dataclasses.dataclass(frozen=True)
class TensorPair:
    """One tensor of theirs and what it is in ours; `join` undoes `split` to the bit, but for what its maker says."""

    theirs: str
    shape: tuple[int, ...]
    ours: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor]], Tensor]
    is_weight: bool = True
    """False for what follows from the config alone: its dtype is nobody's concern."""


def same_tensor(theirs: str, ours: str, *shape: int) -> TensorPair:
    """A tensor that only goes by another name."""
    return TensorPair(theirs, shape, (ours,), lambda tensor: [tensor], lambda tensors: tensors[0])


def changed_tensor(
    theirs: str, ours: str, *shape: int, split: Callable[[Tensor], Tensor], join: Callable[[Tensor], Tensor]
) -> TensorPair:
    """A tensor that is one of ours after `split`, and theirs again after `join`."""
    return TensorPair(theirs, shape, (ours,), lambda tensor: [split(tensor)], lambda tensors: join(tensors[0]))


def derived_tensor(theirs: str, expected: Tensor, *, relative: float = 0.0, absolute: float = 0.0) -> TensorPair:
    """A tensor that follows from the config: none of ours, but it must be what it should.

    Args:
        expected: what it is, in float32.
        relative, absolute: by how many units of its dtype's rounding it may differ (not less than float32's by 64).
    """

    def check(tensor: Tensor) -> Sequence[Tensor]:
        rounding = max(torch.finfo(tensor.dtype).eps, 64 * torch.finfo(torch.float32).eps)
        is_close = torch.allclose(
            tensor.double(), expected.double().to(tensor.device), rtol=relative * rounding, atol=absolute * rounding
        )
        if not is_close:
            raise CheckpointError(
                f"{theirs} must be what the config gives for this layer, but got other values; check layer_index, "
                "num_hidden_layers and num_attention_heads"
            )
        return []

    return TensorPair(theirs, tuple(expected.shape), (), check, lambda tensors: expected, is_weight=False)


def to_ours(pairs: Sequence[TensorPair], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors from theirs, copied.

    Raises:
        CheckpointError: a tensor is missing, is not expected, or has the wrong shape, dtype or values; named.
    """
    check_names(pairs, state)
    dtypes: dict[torch.dtype, str] = {}
    ours: dict[str, Tensor] = {}
    for pair in pairs:
        tensor = state[pair.theirs]
        if tuple(tensor.shape) != pair.shape:
            raise CheckpointError(
                f"{pair.theirs} must have shape {pair.shape} by the config, but got {tuple(tensor.shape)}; "
                "check that config and weights belong together"
            )
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{pair.theirs} must be float16, bfloat16, float32 or float64, but got {tensor.dtype}; "
                "convert quantised weights first"
            )
        if pair.is_weight:
            dtypes.setdefault(tensor.dtype, pair.theirs)
        parts = pair.split(tensor.detach())
        for name, part in zip(pair.ours, parts, strict=True):
            assert name not in ours, name
            ours[name] = part.clone(memory_format=torch.contiguous_format)
    if len(dtypes) > 1:
        found = ", ".join(f"{name} in {dtype}" for dtype, name in dtypes.items())
        raise CheckpointError(f"all weights must have one dtype, but got {found}; convert them to one")
    return ours


def to_theirs(pairs: Sequence[TensorPair], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors from ours, copied. `ours` is the state of a module of ours, so anything left over is our bug."""
    needed = [name for pair in pairs for name in pair.ours]
    assert sorted(needed) == sorted(ours), set(needed) ^ set(ours)
    state = {}
    for pair in pairs:
        tensor = pair.join([ours[name].detach() for name in pair.ours])
        assert tuple(tensor.shape) == pair.shape, (pair.theirs, tuple(tensor.shape), pair.shape)
        assert pair.theirs not in state, pair.theirs
        state[pair.theirs] = tensor.clone(memory_format=torch.contiguous_format)
    return state


def check_names(pairs: Sequence[TensorPair], state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless `state` holds exactly the tensors of theirs."""
    expected = {pair.theirs for pair in pairs}
    assert len(expected) == len(pairs), sorted(pair.theirs for pair in pairs)
    missing = [pair.theirs for pair in pairs if pair.theirs not in state]
    if missing:
        raise CheckpointError(
            f"weights must hold {list_names(missing)}, but got only {list_names(state)}; "
            "pass the state dict that belongs to this config, of the part that is loaded and without a prefix"
        )
    unexpected = [name for name in state if name not in expected]
    if unexpected:
        raise CheckpointError(
            f"every weight must be known, but got {list_names(unexpected)} besides what this config describes; "
            "drop them if they are not part of what is computed"
        )


def list_names(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return (", ".join(names[:MAX_NAMES]) or "nothing") + more


def with_prefixes(pairs: Iterable[TensorPair], theirs: str, ours: str) -> list[TensorPair]:
    """The pairs of a part, named as in the whole."""
    return [
        dataclasses.replace(pair, theirs=theirs + pair.theirs, ours=tuple(ours + name for name in pair.ours))
        for pair in pairs
    ]

"""A rehearsal: code runs on tensors without memory (torch's FakeTensorMode), and every allocation is written down.

What torch.distributed._tools.MemTracker does for modules, this does for a whole training step; importing that one
costs a second and 70 MB, and it cannot tell a float32 master from its bfloat16 weight.
"""

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ("parameters", "gradients", "optimizer", "activations", "temporaries")
PHASES = ("parameters", "forward", "backward", "optimizer")


@dataclass
class Block:
    """One storage: its size, where and when it came to be, when it went (None: it did not).

    `phase` is one of PHASES, `stretch` counts the uninterrupted stretches of phases. `is_on_host`: in the host's memory
    while the model is on a device.
    """

    n_bytes: int
    phase: str
    stretch: int
    born_at: int
    died_at: int | None = None
    is_on_host: bool = False


class Rehearsal(TorchDispatchMode):
    """Notes every storage that is made while it is entered. Moments are counted in births and deaths."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Block] = []
        self.now = 0
        self._phase = self._last_phase = "parameters"
        self._stretch = 0
        self._is_paused = False
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Within it tensors take no memory, and their sizes are noted."""
        with FakeTensorMode(allow_non_fake_inputs=True), self:
            yield

    def begin(self, phase: str) -> None:
        """What is made from now on belongs to `phase`; forward passes over into backward by itself."""
        assert phase in PHASES, phase
        self._phase = phase

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it nothing is noted."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def move_to_host(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count what these tensors hold as the host's."""
        for tensor in tensors:
            index = self._index_of(tensor.untyped_storage())
            assert index is not None, "a tensor that was not made in this rehearsal"
            self.blocks[index].is_on_host = True

    def _index_of(self, storage: torch.UntypedStorage) -> int | None:
        reference, index = self._storages.get(storage._cdata, (None, -1))
        return index if reference is not None and reference() is not None else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and note the storages that its results bring."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # a number is asked of a tensor that has none: a loss or a norm, and it must be finite
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor) and not self._is_paused:
                self._note(result.untyped_storage())
        return results

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if self._index_of(storage) is not None:
            return
        phase = self._phase
        if phase == "forward" and torch._C._current_autograd_node() is not None:
            phase = "backward"
        if phase != self._last_phase:
            self._last_phase, self._stretch = phase, self._stretch + 1
        self.blocks.append(Block(storage.nbytes(), phase, self._stretch, self._tick()))
        index = len(self.blocks) - 1
        self._storages[key] = weakref.ref(storage, lambda _: self._note_death(index)), index

    def _note_death(self, index: int) -> None:
        self.blocks[index].died_at = self._tick()

    def _tick(self) -> int:
        self.now += 1
        return self.now


def peak_by_kind(blocks: list[Block]) -> dict[str, int]:
    """Bytes of each kind at the moment when all live storages together were largest.

    Parameters, gradients and optimizer state are what their phase made and left behind; activations what the forward
    pass left to the backward pass; temporaries the rest.
    """
    changes: dict[int, int] = defaultdict(int)
    for block in blocks:
        changes[block.born_at] += block.n_bytes
        if block.died_at is not None:
            changes[block.died_at] -= block.n_bytes
    live = peak = peak_at = 0
    for moment in sorted(changes):
        live += changes[moment]
        if live > peak:
            peak, peak_at = live, moment
    sums = dict.fromkeys(KINDS, 0)
    ends = {block.stretch: block.born_at for block in blocks}  # the last birth of each stretch
    for block in blocks:
        if block.born_at <= peak_at and (block.died_at is None or block.died_at > peak_at):
            sums[_kind(block, ends)] += block.n_bytes
    assert sum(sums.values()) == peak, (sums, peak)
    return sums


def _kind(block: Block, ends: dict[int, int]) -> str:
    lives_on = block.died_at is None or block.died_at > ends[block.stretch]
    if not lives_on:
        return "temporaries"
    return {"forward": "activations", "backward": "gradients"}.get(block.phase, block.phase)

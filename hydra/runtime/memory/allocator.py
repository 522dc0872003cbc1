"""What glibc's malloc makes of a sequence of allocations: how much stays resident that no tensor uses any more.

Freed blocks stay in the heap: hydra.runtime.choices.keep_freed_memory asks for that, and what a training step frees is
a third of its memory. Modelled: best fit among free blocks, splitting, joining of neighbours, growth at the end, and
mappings of their own for blocks above a threshold (glibc 2.36, malloc.c: _int_malloc, _int_memalign, sysmalloc).
"""

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydra.runtime.memory.tracker import Block

ALIGNMENT = 64  # of torch's CPU allocator
SEARCHED = 96  # glibc looks for that much more, to have room for the alignment: a hole of the very size does not do
PAGE = 4096
MMAP_THRESHOLD = 2**30  # as keep_freed_memory sets it


class Heap:
    """The main arena and the mappings beside it. Addresses count from the heap's beginning."""

    def __init__(self) -> None:
        self.mapped = 0
        self.size = 0  # up to here it was ever used
        self._top = 0  # where the last block ends, and the rest begins
        self._free_by_size: list[tuple[int, int]] = []  # (size, address)
        self._free: dict[int, int] = {}  # address: size
        self._free_ends: dict[int, int] = {}  # address behind it: address

    @property
    def resident(self) -> int:
        """Bytes that the system has had to provide."""
        return self.mapped + self.size

    def allocate(self, n_bytes: int) -> tuple[int | None, int]:
        """(address, size) of a block; the address is None where it has a mapping of its own."""
        size = -(-(n_bytes + 16) // ALIGNMENT) * ALIGNMENT
        index = bisect.bisect_left(self._free_by_size, (size + SEARCHED, -1))
        if index < len(self._free_by_size):
            found, address = self._free_by_size[index]
            self._forget(address, found)
            self._remember(address + size, found - size)
            return address, size
        if self._top + size > self.size and size >= MMAP_THRESHOLD:
            size = -(-size // PAGE) * PAGE
            self.mapped += size
            return None, size
        address, self._top = self._top, self._top + size
        self.size = max(self.size, self._top)
        return address, size

    def release(self, address: int | None, size: int) -> None:
        """Give back what `allocate` gave."""
        if address is None:
            self.mapped -= size
            return
        before = self._free_ends.get(address)
        if before is not None:
            before_size = self._free[before]
            self._forget(before, before_size)
            address, size = before, size + before_size
        after_size = self._free.get(address + size)
        if after_size is not None:
            self._forget(address + size, after_size)
            size += after_size
        if address + size != self._top:
            self._remember(address, size)
        else:
            self._top = address

    def _remember(self, address: int, size: int) -> None:
        bisect.insort(self._free_by_size, (size, address))
        self._free[address] = size
        self._free_ends[address + size] = address

    def _forget(self, address: int, size: int) -> None:
        del self._free_by_size[bisect.bisect_left(self._free_by_size, (size, address))]
        del self._free[address], self._free_ends[address + size]


def resident_peak(blocks: "Sequence[Block]") -> int:
    """The most that is resident when these storages are made and dropped at their moments."""
    events = [(block.born_at, index) for index, block in enumerate(blocks)]
    events += [(block.died_at, index) for index, block in enumerate(blocks) if block.died_at is not None]
    heap, peak = Heap(), 0
    where: dict[int, tuple[int | None, int]] = {}
    for _, index in sorted(events):
        if index in where:
            heap.release(*where.pop(index))
        else:
            where[index] = heap.allocate(blocks[index].n_bytes)
            peak = max(peak, heap.resident)
    return peak

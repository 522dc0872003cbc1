"""What glibc's malloc makes of a sequence of allocations: how much stays resident that no tensor uses any more.

Freed blocks below the mmap threshold stay in the heap, and the heap only shrinks from its end; on a CPU this is a
third of a training process. Modelled: best fit among free blocks, splitting and joining, growth and trimming of the
heap's end, blocks with a mapping of their own, and the threshold between the two that rises when one of those is freed
(glibc 2.36, malloc/malloc.c: _int_malloc, sysmalloc, _int_free, munmap_chunk, systrim).
"""

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydra.runtime.memory.tracker import Block

ALIGNMENT = 64  # of torch's CPU allocator
EXTRA = 96
PAGE = 4096
TOP_PAD = 128 * 2**10
FIRST_MMAP_THRESHOLD = 128 * 2**10
MAX_MMAP_THRESHOLD = 32 * 2**20
CONSOLIDATION = 64 * 2**10


class Heap:
    """The main arena and the mappings beside it. Addresses count from the heap's beginning."""

    def __init__(self) -> None:
        self.mapped = 0
        self.mmap_threshold, self.trim_threshold = FIRST_MMAP_THRESHOLD, 128 * 2**10
        self._end = 0  # of the heap, as the system knows it
        self._top = 0  # where the last block ends, and the rest begins
        self._touched = 0  # everything below has been written since the system gave it
        self._free_by_size: list[tuple[int, int]] = []  # (size, address)
        self._free: dict[int, int] = {}  # address: size
        self._free_ends: dict[int, int] = {}  # address behind it: address

    @property
    def resident(self) -> int:
        """Bytes that the system has had to provide."""
        return self.mapped + max(self._touched, self._top)

    def allocate(self, n_bytes: int) -> tuple[int | None, int]:
        """(address, size) of a block; the address is None where it has a mapping of its own."""
        size = -(-(n_bytes + 16) // ALIGNMENT) * ALIGNMENT
        index = bisect.bisect_left(self._free_by_size, (size + EXTRA, -1))
        if index < len(self._free_by_size):
            found, address = self._free_by_size[index]
            self._forget(address, found)
            if found > size:
                self._remember(address + size, found - size)
            return address, size
        if self._end - self._top < size + EXTRA + 32:
            if size >= self.mmap_threshold:
                size = -(-(size + ALIGNMENT) // PAGE) * PAGE
                self.mapped += size
                return None, size
            self._end = -(-(self._top + size + TOP_PAD) // PAGE) * PAGE
        address, self._top = self._top, self._top + size
        self._touched = max(self._touched, self._top)
        return address, size

    def release(self, address: int | None, size: int) -> None:
        """Give back what `allocate` gave."""
        if address is None:
            self.mapped -= size
            if self.mmap_threshold < size <= MAX_MMAP_THRESHOLD:
                self.mmap_threshold, self.trim_threshold = size, 2 * size
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
        if size >= CONSOLIDATION and self._end - self._top >= self.trim_threshold:
            self._end = -(-(self._top + TOP_PAD) // PAGE) * PAGE
            self._touched = min(self._touched, self._end)

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
    heap, where, peak = Heap(), {}, 0
    for _, index in sorted(events):
        if index in where:
            heap.release(*where.pop(index))
        else:
            where[index] = heap.allocate(blocks[index].n_bytes)
            peak = max(peak, heap.resident)
    return peak

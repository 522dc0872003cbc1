"""From a rehearsal to a peak, and from peaks to a plan that fits: the ladder. No torch in this file."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from hydra.runtime import paths
from hydra.runtime.memory.host import HostMemory

if TYPE_CHECKING:
    from hydra.runtime.memory.tracker import Rehearsal

MIB = 2**20
# Measured with torch 2.13.0 and glibc 2.36 (diagnostics/memory_accuracy.py calibration), in bytes:
IMPORTS = 304 * MIB
"""Resident after the trainer's imports."""
LIBRARIES = 50 * MIB
"""oneDNN's and MKL's code as it is read in, generated kernels and their scratch memory."""
COMPILER = 100 * MIB
"""torch's compiler and what it leaves behind."""
PINNED_SHARE = 0.15
"""Of the modelled heap: small objects that stand between freed blocks keep these from being joined."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Bytes at the peak of a training step, by what they are for."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    temporaries: int
    allocator: int
    """Freed, but not given back to the system."""
    process: int
    """Interpreter, libraries, compiler."""

    @property
    def total(self) -> int:
        """Resident memory of the process at its peak."""
        return sum(self.by_kind().values())

    def by_kind(self) -> dict[str, int]:
        """Every part by name."""
        return dataclasses.asdict(self)


def predict(rehearsal: "Rehearsal", *, is_compiled: bool) -> Prediction:
    """The peak of a process that does on real memory what was rehearsed."""
    from hydra.runtime.memory.allocator import resident_peak
    from hydra.runtime.memory.tracker import peak_by_kind

    kinds = peak_by_kind(rehearsal.blocks)
    heap = int((1 + PINNED_SHARE) * resident_peak(rehearsal.blocks))
    return Prediction(
        **kinds,
        allocator=max(0, heap - sum(kinds.values())),
        process=IMPORTS + LIBRARIES + (COMPILER if is_compiled else 0),
    )

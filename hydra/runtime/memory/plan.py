"""From a rehearsal to a peak, and from peaks to a plan that fits: the ladder. No torch in this file."""

import dataclasses
import hashlib
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
IMPORTS = 340 * MIB
"""Resident before the first step, less the model: interpreter, torch, TensorBoard."""
LIBRARIES = 50 * MIB
"""oneDNN's and MKL's code as it is read in, generated kernels and their scratch memory."""
COMPILER = 90 * MIB
"""torch's compiler and what it leaves behind."""
PINNED_SHARE, PINNED_SHARE_ACCUMULATING, PINNED_SHARE_COMPILED = 0.25, 0.35, 0.1
"""Of the heap that comes and goes: small objects, which the model of it leaves out, keep freed blocks apart. Several
micro-batches in a step leave more of them, compiled code makes fewer."""


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
    checkpoint_copies: int = 0
    """Weights and optimizer state once more, of which checkpoints are written in the background."""
    on_host: int = 0
    """Of a run on a GPU: what it takes in the host's memory, which is no part of the total: optimizer, copies."""

    @property
    def total(self) -> int:
        """Memory of the process at its peak, where its model is."""
        return sum(self.by_kind().values())

    def by_kind(self) -> dict[str, int]:
        """Every part of the total by name."""
        parts = dataclasses.asdict(self)
        del parts["on_host"]
        return parts


def predict_on_gpu(rehearsal: "Rehearsal") -> Prediction:
    """The peak on a device of its own: what torch's allocator there hands out, as torch.cuda.max_memory_allocated
    counts it. Not compared with a real device yet.
    """
    from hydra.runtime.memory.tracker import peak_by_kind

    kinds = peak_by_kind([block for block in rehearsal.blocks if not block.is_on_host])
    on_host = sum(peak_by_kind([block for block in rehearsal.blocks if block.is_on_host]).values())
    return Prediction(**kinds, allocator=0, process=0, on_host=on_host)


def predict(rehearsal: "Rehearsal", *, is_eager: bool, has_compiler: bool, is_accumulating: bool) -> Prediction:
    """The peak of a process that does on real memory what was rehearsed.

    Args:
        is_eager: blocks run as they are written, at first or always.
        has_compiler: blocks are compiled, at once or later.
        is_accumulating: a step has more than one micro-batch.
    """
    from hydra.runtime.memory.allocator import resident_peak
    from hydra.runtime.memory.tracker import peak_by_kind

    kinds = peak_by_kind(rehearsal.blocks)
    resident = resident_peak(rehearsal.blocks)
    lasting = kinds["parameters"] + kinds["gradients"] + kinds["optimizer"]
    share = PINNED_SHARE_ACCUMULATING if is_accumulating else PINNED_SHARE
    heap = resident + int((share if is_eager else PINNED_SHARE_COMPILED) * (resident - lasting))
    return Prediction(
        **kinds,
        allocator=max(0, heap - sum(kinds.values())),
        process=IMPORTS + LIBRARIES + (COMPILER if has_compiler else 0),
    )


@dataclass(frozen=True)
class Rung:
    """One way to run the same global batch."""

    micro_batch_size: int
    activation_checkpointing: str
    optimizer_offload: bool = False


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How a run is cut to fit its memory, and why. `tried` are the rungs that were predicted, with their totals."""

    micro_batch_size: int
    n_micro_batches: int
    activation_checkpointing: str
    prediction: Prediction
    limit_bytes: int
    limit_source: str
    optimizer_offload: bool = False
    checkpoint_bytes: int = 0
    """Of the tensors of one checkpoint."""
    planned_for: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """Fields of the config that it holds for and that a run may change. (Plans of before did not say it.)"""
    tried: tuple[tuple[Rung, int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; from_dict takes it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Self:
        """Build from what to_dict gave."""
        values = dict(mapping)
        values["prediction"] = Prediction(**values["prediction"])
        values["tried"] = tuple((Rung(**rung), total) for rung, total in values["tried"])
        return cls(**values)

    def describe(self) -> str:
        """One sentence for the log."""
        cut = f"{self.n_micro_batches} micro-batch{'es' if self.n_micro_batches > 1 else ''}"
        return (
            f"{self.prediction.total / MIB:,.0f} MiB predicted, {self.limit_bytes / MIB:,.0f} MiB allowed "
            f"({self.limit_source}): {cut} of {self.micro_batch_size} rows, "
            f"activation checkpointing {self.activation_checkpointing}"
            f"{', optimizer on the host' if self.optimizer_offload else ''}"
        )


def read_plan(run_dir: Path) -> MemoryPlan | None:
    """The plan that the run in `run_dir` keeps; None before there is one.

    Raises:
        RunError: `memory.json` is damaged.
    """
    stored = paths.read_json(run_dir / paths.MEMORY_PLAN)
    try:
        return MemoryPlan.from_dict(stored) if stored else None
    except (KeyError, TypeError, ValueError) as error:
        raise paths.damaged(run_dir / paths.MEMORY_PLAN, repr(error)) from None


def build_ladder(
    micro_batch_sizes: Sequence[int], checkpointing: Sequence[str], optimizer_offload: Sequence[bool] = (False,)
) -> list[list[Rung]]:
    """Rungs, cheapest first: every smaller micro-batch before anything is computed twice, and that before the
    optimizer goes to the host. Each row falls in memory.
    """
    sizes = sorted(micro_batch_sizes, reverse=True)
    rows = [(kept, optimizer_offload[0]) for kept in checkpointing]
    rows += [(checkpointing[-1], offload) for offload in optimizer_offload[1:]]
    return [[Rung(size, kept, offload) for size in sizes] for kept, offload in rows]


def find_rung(
    ladder: Sequence[Sequence[Rung]], total_of: Callable[[Rung], int], limit_bytes: int
) -> tuple[Rung | None, dict[Rung, int]]:
    """The first rung that fits, and the totals of those that were looked at; None if the last one does not fit.

    In a row memory falls with the micro-batch, so that its smallest tells whether the row has a rung that fits, and
    halving finds the first.
    """
    looked_at: dict[Rung, int] = {}

    def fits(rung: Rung) -> bool:
        if rung not in looked_at:
            looked_at[rung] = total_of(rung)
        return looked_at[rung] <= limit_bytes

    for row in ladder:
        if fits(row[0]):
            return row[0], looked_at
        if not fits(row[-1]):
            continue
        low, high = 0, len(row) - 1  # row[low] does not fit, row[high] does
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(row[middle]) else (middle, high)
        return row[high], looked_at
    return None, looked_at


def allowed_memory(host: HostMemory, limit_mib: int, kept_free: float = 0.1) -> HostMemory:
    """What a run may take: the limit that was asked for, or the host's less the share that is kept free."""
    of_host = HostMemory(int((1 - kept_free) * host.limit_bytes), host.source)
    asked = HostMemory(limit_mib * MIB, "memory_limit_mib")
    return asked if limit_mib and asked.limit_bytes < of_host.limit_bytes else of_host


def cached_prediction(directory: Path, key: str, compute: Callable[[], Prediction]) -> Prediction:
    """The prediction that is kept under `key`, else that which `compute` makes, which is kept from now on."""
    path = directory / f"{key}.json"
    stored = paths.read_json(path)
    if stored:
        return Prediction(**stored)
    prediction = compute()
    directory.mkdir(parents=True, exist_ok=True)
    paths.write_json(path, dataclasses.asdict(prediction))
    return prediction


def digest_of(value: Mapping[str, object], sources: Sequence[Path]) -> str:
    """A key of what a prediction depends on: the values, and the code below `sources`."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode())
    for source in sources:
        for path in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]

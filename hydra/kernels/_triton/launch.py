"""What the kernels share: checks of their arguments, launch shapes, and the description of an ahead-of-time build.

X rows (all leading axes flattened), D width of a row.
"""

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from hydra.errors import ConfigError

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether triton was imported as its interpreter, which runs kernels on a CPU, one program after the other."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILE = 2048
"""Elements that a program holds at a time at least: narrow rows share a program until they have so many together."""
MAX_WIDTH = 8192
"""Widest row that a program holds whole: 16 elements of each tensor in each of 512 threads, which may have 128
registers each. Twice as many threads would have half of them, and spill."""
MAX_ROWS = 2**31 - 2**16
"""Most rows where they are counted in 32 bits, as programs of a grid are; elements are counted in 64."""
MAX_COLUMN_BLOCK = 1024
"""Widest piece of a row for kernels that need not see a row as a whole."""


@dataclasses.dataclass(frozen=True)
class AotCase:
    """One form of a kernel, as a launch on a GPU would compile it; diagnostics/triton_aot.py does so without one."""

    kernel: Any
    """The @triton.jit function."""
    arguments: Mapping[str, Any]
    """Each run-time argument by name. A pointer by its type, as `*bf16` (aligned to 16 bytes, as torch's memory is); an
    integer by an example, whose being 1 or divisible by 16 is compiled in as a launch does; a float as `fp32`."""
    constants: Mapping[str, Any]
    """Each tl.constexpr argument by name."""
    num_warps: int
    num_stages: int = 3
    """What Triton takes when a launch does not say."""
    instruction: str | None = None
    """Which matrix instruction must be in the code: `dot` for the chip's best one, `mma.sync` for that one on every
    chip (tiles too small for the best), None for none at all."""
    label: str = ""
    """What tells this case from the kernel's others, such as `bf16 D=1024`."""


def check_inputs(operator: str, **tensors: Tensor) -> None:
    """Return if the tensors are on one device and in dtypes that the kernels take.

    Raises:
        ConfigError: naming the first that is not.
    """
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ConfigError(
                f"{operator} must get {name} in float32, float16 or bfloat16 from kernels=triton, but got "
                f"{tensor.dtype}; convert it, or ask for kernels=torch"
            )
        if tensor.device != first.device:
            raise ConfigError(
                f"{operator} must get its tensors on one device, but got {first_name} on {first.device} and {name} on "
                f"{tensor.device}; move one of them"
            )


def check_width(operator: str, width: int) -> None:
    """Return if a program can hold a row of this width; ConfigError if not."""
    if not 1 <= width <= MAX_WIDTH:
        raise ConfigError(
            f"{operator} must get rows of 1 to {MAX_WIDTH} channels from kernels=triton, but got {width}; ask for "
            "kernels=torch"
        )


def as_rows(x: Tensor) -> Tensor:
    """x as a matrix (X, D) whose rows are contiguous in themselves: a view if x has one stride between rows."""
    rows_XD = x.reshape(-1, x.shape[-1])
    return rows_XD if rows_XD.stride(-1) == 1 or rows_XD.shape[-1] == 1 else rows_XD.contiguous()


@dataclasses.dataclass(frozen=True)
class RowLaunch:
    """How rows are cut into programs: n_rows whole rows of block_width columns each (a power of two)."""

    n_rows: int
    block_width: int
    num_warps: int

    def grid(self, n_rows: int, width: int) -> tuple[int, int]:
        """Programs along the rows and along the columns of a matrix."""
        return triton.cdiv(n_rows, self.n_rows), triton.cdiv(width, self.block_width)


def whole_rows(width: int) -> RowLaunch:
    """For kernels that reduce over a row: all of it in one program, several rows if they are narrow."""
    block_width = triton.next_power_of_2(width)
    n_rows = max(1, TILE // block_width)
    # 16 elements of a tensor in each thread: wide loads, and no spilling with three tensors held at once.
    num_warps = n_rows * block_width // 512
    return RowLaunch(n_rows, block_width, num_warps)


def column_blocks(width: int) -> RowLaunch:
    """For element-wise kernels: pieces of rows, several rows if they are narrow; 8 elements in each thread."""
    block_width = min(triton.next_power_of_2(width), MAX_COLUMN_BLOCK)
    return RowLaunch(MAX_COLUMN_BLOCK // block_width, block_width, 4)


def reduction_programs(n_tiles: int, num_warps: int, device: torch.device) -> int:
    """How many programs share n_tiles tiles when each leaves a partial sum: 16 warps on every multiprocessor.

    That keeps enough loads under way; more would only add partial sums to write and read again.
    """
    return min(n_tiles, max(1, 16 // num_warps) * _n_processors(device))


@cache
def _n_processors(device: torch.device) -> int:
    # Interpreted, few: so that programs have several tiles each in small tests as well.
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count

"""The operators of a decode step, for few tokens at a time, on a CPU: bound by how fast weights and cache are read.

They are C++ (_cpp/decode.cpp), compiled on first use; load_native makes them available. hydra.kernels.reference.decode
says what they compute.

O outputs, I inputs, N query heads, K key/value heads, S tokens that a cache holds, H head width (E that of values).
"""

import mmap
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hydra.kernels._cpp.build import load_library

NATIVE_DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of activations that the operators take."""
HUGE_PAGE = 1 << 21
LINE = 64


@cache
def _load() -> None:
    load_library("decode")
    torch.library.register_fake("hydra::decode_linear", _fake_linear)
    torch.library.register_fake("hydra::decode_attention", _fake_attention)


def _fake_linear(x: Tensor, matrices: list[Tensor]) -> Tensor:
    n_out = sum(matrix.shape[0] for matrix in matrices if matrix.ndim == 2)
    return x.new_empty(x.numel() // x.shape[-1] * n_out)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


def load_native(n_threads: int) -> None:
    """Make the operators available, to be run by n_threads threads.

    Raises:
        ConfigError: there is no C++ compiler, or it does not take the source.
    """
    _load()
    torch.ops.hydra.decode_set_threads(n_threads)


class DirectCalls(dict[torch._ops.OpOverload, list[str]]):
    """Operators and the C functions that compute them.

    Pickled by the operators' names: they have no pickled form themselves, and compiled code is kept under this one.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _find_operators, ({operator._opname: declarations for operator, declarations in self.items()},)


def _find_operators(declarations: dict[str, list[str]]) -> DirectCalls:
    return DirectCalls({getattr(torch.ops.hydra, name).default: lines for name, lines in declarations.items()})


def direct_calls() -> DirectCalls:
    """For inductor's option aot_inductor.custom_ops_to_c_shims: the operators, as compiled code calls them in C."""
    tensors = {"decode_linear": "AtenTensorHandle, const AtenTensorHandle*, int64_t"}
    tensors["decode_attention"] = "AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle"
    return _find_operators(
        {
            name: [f"AOTITorchError aoti_torch_cpu_{name}({inputs}, AtenTensorHandle*)"]
            for name, inputs in tensors.items()
        }
    )


def native_linear(x: Tensor, weight_OI: Tensor, scales_O: Tensor | None = None) -> Tensor:
    """x W^T for x (..., I) of few rows, with float32 sums, in the dtype of x.

    Args:
        x: float32 or bfloat16, contiguous.
        weight_OI: in the dtype of x; or uint8 with 128 added to each number, whose scales are then given.
        scales_O: float32. The activations then enter as 16-bit whole numbers with one scale for each row, which rounds
            them less than bfloat16 does.
    """
    matrices = [weight_OI] if scales_O is None else [weight_OI, scales_O]
    return torch.ops.hydra.decode_linear(x, matrices).view(*x.shape[:-1], weight_OI.shape[0])


def native_single_query_attention(q_BN1H: Tensor, k_BKSH: Tensor, v_BKSE: Tensor, mask_B11S: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(H) + mask) v, one query token for each row; each key and value is read once.

    Keys before the first visible one and after the last are not read.

    Args:
        q_BN1H, k_BKSH, v_BKSE: float32 or bfloat16; values may have a width E of their own.
        mask_B11S: 0 or -inf, in their dtype; its batch may be 1.
    Returns:
        out_BN1E in the dtype of q.
    """
    return torch.ops.hydra.decode_attention(q_BN1H.contiguous(), k_BKSH, v_BKSE, mask_B11S.contiguous())


def pack(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of CPU tensors, one behind the other in memory made of huge pages where the system has them.

    A step reads all weights once, so with pages of 4 KiB every page costs a look-up of its address.
    """
    starts, stop = [], 0
    for tensor in tensors:
        starts.append(stop)
        stop += -(-tensor.nbytes // LINE) * LINE
    memory = mmap.mmap(-1, stop + HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    first = -everything.data_ptr() % HUGE_PAGE
    packed = []
    for tensor, start in zip(tensors, starts, strict=True):
        place = everything[first + start : first + start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        packed.append(place.copy_(tensor))
    return packed

"""The gate of SwiGLU, forward and backward, each in one pass over its memory. X rows, F width."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydra.errors import ConfigError
from hydra.kernels._triton.launch import AotCase, as_rows, check_inputs, column_blocks


@triton.jit
def forward_kernel(
    gate_ptr, up_ptr, y_ptr, n_rows, width, gate_stride, up_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """y = gate * sigmoid(gate) * up for ROWS x BLOCK elements."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (rows < n_rows) & (columns < width)
    gate = tl.load(gate_ptr + rows * gate_stride + columns, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_stride + columns, mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + rows * width + columns, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    grad_y_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    n_rows,
    width,
    grad_y_stride,
    gate_stride,
    up_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With s = sigmoid(gate): grad_up = grad_y gate s, grad_gate = grad_y up s (1 + gate (1 - s))."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (rows < n_rows) & (columns < width)
    grad_y = tl.load(grad_y_ptr + rows * grad_y_stride + columns, mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + rows * gate_stride + columns, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_stride + columns, mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = grad_y * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    grad_up = grad_y * gate * sigmoid
    tl.store(grad_gate_ptr + rows * width + columns, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask)
    tl.store(grad_up_ptr + rows * width + columns, grad_up.to(grad_up_ptr.dtype.element_ty), mask)


@torch.library.custom_op("hydra::swiglu", mutates_args=())
def swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    """In the shape and dtype of gate, contiguous."""
    check_inputs("swiglu", gate=gate, up=up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ConfigError(
            f"swiglu must get gate and up of one shape and dtype, but got {tuple(gate.shape)} in {gate.dtype} and "
            f"{tuple(up.shape)} in {up.dtype}; convert one of them"
        )
    gate_XF, up_XF = as_rows(gate), as_rows(up)
    n_rows, width = gate_XF.shape
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel() > 0:
        launch = column_blocks(width)
        forward_kernel[launch.grid(n_rows, width)](
            gate_XF,
            up_XF,
            y,
            n_rows,
            width,
            gate_XF.stride(0),
            up_XF.stride(0),
            ROWS=launch.n_rows,
            BLOCK=launch.block_width,
            num_warps=launch.num_warps,
        )
    return y


@swiglu_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.custom_op("hydra::swiglu_backward", mutates_args=())
def swiglu_backward_op(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, contiguous."""
    grad_y_XF, gate_XF, up_XF = as_rows(grad_y), as_rows(gate), as_rows(up)
    n_rows, width = gate_XF.shape
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    grad_up = torch.empty_like(up, memory_format=torch.contiguous_format)
    if gate.numel() > 0:
        launch = column_blocks(width)
        backward_kernel[launch.grid(n_rows, width)](
            grad_y_XF,
            gate_XF,
            up_XF,
            grad_gate,
            grad_up,
            n_rows,
            width,
            grad_y_XF.stride(0),
            gate_XF.stride(0),
            up_XF.stride(0),
            ROWS=launch.n_rows,
            BLOCK=launch.block_width,
            num_warps=launch.num_warps,
        )
    return grad_gate, grad_up


@swiglu_backward_op.register_fake
def _(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return torch.empty_like(gate, memory_format=contiguous), torch.empty_like(up, memory_format=contiguous)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_backward_op(grad_y, *ctx.saved_tensors)


swiglu_op.register_autograd(_backward, setup_context=_setup_context)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See hydra.kernels.swiglu."""
    return swiglu_op(gate, up)


def aot_cases() -> list[AotCase]:
    """Feed-forward widths of the presets are 1024 and above: one tile fits all; tests' own, 64."""
    cases = []
    forward: dict[str, Any]
    backward: dict[str, Any]
    for width, dtype in [(64, "fp32"), (1024, "bf16"), (1024, "fp32")]:
        launch = column_blocks(width)
        constants = {"ROWS": launch.n_rows, "BLOCK": launch.block_width}
        shape = {"n_rows": 16384, "width": width, "gate_stride": width, "up_stride": width}
        pointer = f"*{dtype}"
        forward = {**dict.fromkeys(("gate_ptr", "up_ptr", "y_ptr"), pointer), **shape}
        names = ("grad_y_ptr", "gate_ptr", "up_ptr", "grad_gate_ptr", "grad_up_ptr")
        backward = {**dict.fromkeys(names, pointer), **shape, "grad_y_stride": width}
        for kernel, arguments in ((forward_kernel, forward), (backward_kernel, backward)):
            cases.append(AotCase(kernel, arguments, constants, launch.num_warps, label=f"{dtype} F>={width}"))
    return cases

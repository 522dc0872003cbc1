"""Squared ReLU, forward and backward, each in one pass over its memory. X rows, F width."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydra.kernels._triton.launch import AotCase, as_rows, check_inputs, column_blocks


@triton.jit
def forward_kernel(x_ptr, y_ptr, n_rows, width, x_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y = max(x, 0)**2 for ROWS x BLOCK elements; NaN stays NaN."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (rows < n_rows) & (columns < width)
    x = tl.load(x_ptr + rows * x_stride + columns, mask, other=0.0).to(tl.float32)
    positive = tl.where(x < 0.0, 0.0, x)
    tl.store(y_ptr + rows * width + columns, (positive * positive).to(y_ptr.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    grad_y_ptr, x_ptr, grad_x_ptr, n_rows, width, grad_y_stride, x_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """grad_x = 2 max(x, 0) grad_y."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (rows < n_rows) & (columns < width)
    x = tl.load(x_ptr + rows * x_stride + columns, mask, other=0.0).to(tl.float32)
    grad_y = tl.load(grad_y_ptr + rows * grad_y_stride + columns, mask, other=0.0).to(tl.float32)
    grad_x = 2.0 * tl.where(x < 0.0, 0.0, x) * grad_y
    tl.store(grad_x_ptr + rows * width + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask)


@torch.library.custom_op("hydra::squared_relu", mutates_args=())
def squared_relu_op(x: Tensor) -> Tensor:
    """In the shape and dtype of x, contiguous."""
    check_inputs("squared_relu", x=x)
    x_XF = as_rows(x)
    n_rows, width = x_XF.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() > 0:
        launch = column_blocks(width)
        forward_kernel[launch.grid(n_rows, width)](
            x_XF,
            y,
            n_rows,
            width,
            x_XF.stride(0),
            ROWS=launch.n_rows,
            BLOCK=launch.block_width,
            num_warps=launch.num_warps,
        )
    return y


@squared_relu_op.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("hydra::squared_relu_backward", mutates_args=())
def squared_relu_backward_op(grad_y: Tensor, x: Tensor) -> Tensor:
    """Gradient of x, contiguous."""
    grad_y_XF, x_XF = as_rows(grad_y), as_rows(x)
    n_rows, width = x_XF.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        launch = column_blocks(width)
        backward_kernel[launch.grid(n_rows, width)](
            grad_y_XF,
            x_XF,
            grad_x,
            n_rows,
            width,
            grad_y_XF.stride(0),
            x_XF.stride(0),
            ROWS=launch.n_rows,
            BLOCK=launch.block_width,
            num_warps=launch.num_warps,
        )
    return grad_x


@squared_relu_backward_op.register_fake
def _(grad_y: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad_y: Tensor) -> Tensor:
    return squared_relu_backward_op(grad_y, ctx.saved_tensors[0])


squared_relu_op.register_autograd(_backward, setup_context=_setup_context)


def squared_relu(x: Tensor) -> Tensor:
    """See hydra.kernels.squared_relu."""
    return squared_relu_op(x)


def aot_cases() -> list[AotCase]:
    """Feed-forward widths of the presets are 1024 and above: one tile fits all; tests' own, 64."""
    cases = []
    forward: dict[str, Any]
    backward: dict[str, Any]
    for width, dtype in [(64, "fp32"), (1024, "bf16"), (1024, "fp32")]:
        launch = column_blocks(width)
        constants = {"ROWS": launch.n_rows, "BLOCK": launch.block_width}
        shape = {"n_rows": 16384, "width": width, "x_stride": width}
        forward = {**dict.fromkeys(("x_ptr", "y_ptr"), f"*{dtype}"), **shape}
        backward = {**dict.fromkeys(("grad_y_ptr", "x_ptr", "grad_x_ptr"), f"*{dtype}"), **shape}
        backward["grad_y_stride"] = width
        for kernel, arguments in ((forward_kernel, forward), (backward_kernel, backward)):
            cases.append(AotCase(kernel, arguments, constants, launch.num_warps, label=f"{dtype} F>={width}"))
    return cases

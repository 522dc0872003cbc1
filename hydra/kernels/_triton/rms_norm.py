"""RMSNorm, forward and backward, each in one pass over its memory.

X rows, D width, P programs of the backward pass.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydra.kernels._triton.launch import (
    MAX_WIDTH,
    AotCase,
    as_rows,
    check_inputs,
    check_width,
    reduction_programs,
    whole_rows,
)


@triton.jit
def forward_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, n_rows, width, x_stride, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """y = x * rstd * weight for ROWS rows; rstd (X,) is kept for the backward pass."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    is_row, is_column = rows < n_rows, columns < width
    mask = is_row[:, None] & is_column[None, :]

    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, is_column, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    y = x * rstd[:, None] * weight[None, :]

    tl.store(rstd_ptr + rows, rstd, is_row)
    tl.store(y_ptr + rows[:, None] * width + columns[None, :], y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    grad_y_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    grad_x_ptr,
    partial_ptr,
    n_rows,
    width,
    grad_y_stride,
    x_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of x, and in partial (P, D) this program's share of the gradient of the weight, in float32.

    With n = x * rstd and g = grad_y * weight: grad_x = rstd * (g - n * mean(g * n)), grad_weight = sum(grad_y * n).
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    is_column = columns < width
    weight = tl.load(weight_ptr + columns, is_column, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], dtype=tl.float32)

    # Every P-th tile is this program's: which rows a partial sum holds depends on the shape and the device alone.
    for tile in range(program, tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        is_row = rows < n_rows
        mask = is_row[:, None] & is_column[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + rows[:, None] * grad_y_stride + columns[None, :], mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, is_row, other=0.0)

        normed = x * rstd[:, None]
        grad_normed = grad_y * weight[None, :]
        mean = tl.sum(grad_normed * normed, axis=1) / width
        grad_x = rstd[:, None] * (grad_normed - normed * mean[:, None])
        grad_weight += tl.sum(grad_y * normed, axis=0)
        tl.store(grad_x_ptr + rows[:, None] * width + columns[None, :], grad_x.to(grad_x_ptr.dtype.element_ty), mask)

    tl.store(partial_ptr + program.to(tl.int64) * width + columns, grad_weight, is_column)


@torch.library.custom_op("hydra::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y in the shape and dtype of x, contiguous, and rstd (X,) in float32."""
    check_inputs("rms_norm", x=x, weight=weight_D)
    check_width("rms_norm", x.shape[-1])
    x_XD, weight_D = as_rows(x), weight_D.contiguous()
    n_rows, width = x_XD.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd_X = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    if n_rows > 0:
        launch = whole_rows(width)
        forward_kernel[(triton.cdiv(n_rows, launch.n_rows),)](
            x_XD,
            weight_D,
            y,
            rstd_X,
            n_rows,
            width,
            x_XD.stride(0),
            eps,
            ROWS=launch.n_rows,
            BLOCK=launch.block_width,
            num_warps=launch.num_warps,
        )
    return y, rstd_X


@rms_norm_op.register_fake
def _(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@torch.library.custom_op("hydra::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(grad_y: Tensor, x: Tensor, weight_D: Tensor, rstd_X: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (contiguous) and of the weight, in their dtypes."""
    grad_y_XD, x_XD, weight_D = as_rows(grad_y), as_rows(x), weight_D.contiguous()
    n_rows, width = x_XD.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    if n_rows == 0:
        return grad_x, torch.zeros_like(weight_D)
    launch = whole_rows(width)
    n_programs = reduction_programs(triton.cdiv(n_rows, launch.n_rows), launch.num_warps, x.device)
    partial_PD = torch.empty(n_programs, width, dtype=torch.float32, device=x.device)
    backward_kernel[(n_programs,)](
        grad_y_XD,
        x_XD,
        weight_D,
        rstd_X,
        grad_x,
        partial_PD,
        n_rows,
        width,
        grad_y_XD.stride(0),
        x_XD.stride(0),
        ROWS=launch.n_rows,
        BLOCK=launch.block_width,
        num_warps=launch.num_warps,
    )
    return grad_x, partial_PD.sum(dim=0).to(weight_D.dtype)


@rms_norm_backward_op.register_fake
def _(grad_y: Tensor, x: Tensor, weight_D: Tensor, rstd_X: Tensor) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, torch.empty_like(weight_D, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    x, weight_D, _ = inputs
    ctx.save_for_backward(x, weight_D, output[1])


def _backward(ctx: Any, grad_y: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, None]:
    return *rms_norm_backward_op(grad_y, *ctx.saved_tensors), None


rms_norm_op.register_autograd(_backward, setup_context=_setup_context)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See hydra.kernels.rms_norm."""
    return rms_norm_op(x, weight_D, eps)[0]


def aot_cases() -> list[AotCase]:
    """Widths of the presets' models, 256 (debug) to 2304 (1.5B); tests' own, 32; and the widest that is taken."""
    cases = []
    forward: dict[str, Any]
    backward: dict[str, Any]
    widths = [(width, "bf16") for width in (256, 512, 1024, 2048, 2304, MAX_WIDTH)]
    for width, dtype in [(32, "fp32"), (MAX_WIDTH, "fp32"), *widths]:
        launch = whole_rows(width)
        constants = {"ROWS": launch.n_rows, "BLOCK": launch.block_width}
        shape = {"n_rows": 16384, "width": width, "x_stride": width}
        x = f"*{dtype}"
        forward = {"x_ptr": x, "weight_ptr": x, "y_ptr": x, "rstd_ptr": "*fp32", **shape, "eps": "fp32"}
        backward = {
            **{"grad_y_ptr": x, "x_ptr": x, "weight_ptr": x, "rstd_ptr": "*fp32", "grad_x_ptr": x},
            **{"partial_ptr": "*fp32", **shape, "grad_y_stride": width},
        }
        for kernel, arguments in ((forward_kernel, forward), (backward_kernel, backward)):
            cases.append(AotCase(kernel, arguments, constants, launch.num_warps, label=f"{dtype} D={width}"))
    return cases

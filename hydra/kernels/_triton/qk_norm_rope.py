"""Norm over heads, temperature and rotary embedding in one pass over memory, forward and backward.

A row is one head of one token. It is read in three pieces, so that the two channels of a pair meet in one thread:
its first R channels, the second R, and what is not rotated.

B batch, T tokens, N heads, H head width, R half of the rotated width, X = B T N rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydra.errors import ConfigError
from hydra.kernels._triton.launch import MAX_ROWS, TILE, AotCase, check_inputs

MAX_HEAD_WIDTH = 1024
"""A row has to fit a program several times over."""


@triton.jit
def _load_pieces(
    ptr, offsets, is_row, WIDTH: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr
):
    """First, second and unrotated channels of the rows that begin at offsets, in float32; zeros beside them."""
    pairs = tl.arange(0, BLOCK_HALF)
    mask = is_row[:, None] & (pairs < HALF)[None, :]
    pointers = ptr + offsets[:, None] + pairs[None, :]
    first = tl.load(pointers, mask, other=0.0).to(tl.float32)
    second = tl.load(pointers + HALF, mask, other=0.0).to(tl.float32)
    others = 2 * HALF + tl.arange(0, BLOCK_REST)
    mask = is_row[:, None] & (others < WIDTH)[None, :]
    rest = tl.load(ptr + offsets[:, None] + others[None, :], mask, other=0.0).to(tl.float32)
    return first, second, rest


@triton.jit
def _store_pieces(
    ptr,
    offsets,
    is_row,
    first,
    second,
    rest,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    pairs = tl.arange(0, BLOCK_HALF)
    mask = is_row[:, None] & (pairs < HALF)[None, :]
    pointers = ptr + offsets[:, None] + pairs[None, :]
    tl.store(pointers, first.to(ptr.dtype.element_ty), mask)
    tl.store(pointers + HALF, second.to(ptr.dtype.element_ty), mask)
    others = 2 * HALF + tl.arange(0, BLOCK_REST)
    mask = is_row[:, None] & (others < WIDTH)[None, :]
    tl.store(ptr + offsets[:, None] + others[None, :], rest.to(ptr.dtype.element_ty), mask)


@triton.jit
def _load_angles(cos_ptr, sin_ptr, offsets, is_row, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    pairs = tl.arange(0, BLOCK_HALF)
    mask = is_row[:, None] & (pairs < HALF)[None, :]
    cos = tl.load(cos_ptr + offsets[:, None] + pairs[None, :], mask, other=0.0)
    sin = tl.load(sin_ptr + offsets[:, None] + pairs[None, :], mask, other=0.0)
    return cos, sin


@triton.jit
def _dot(a_first, a_second, a_rest, b_first, b_second, b_rest):
    """Sum over each row of a * b."""
    return tl.sum(a_first * b_first + a_second * b_second, axis=1) + tl.sum(a_rest * b_rest, axis=1)


@triton.jit
def forward_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    temp_ptr,
    y_ptr,
    n_rows,
    n_tokens,
    n_heads,
    x_batch_stride,
    x_token_stride,
    x_head_stride,
    angles_batch_stride,
    eps,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_TEMP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """y = rotate(x * rstd * exp(temp)) for ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < n_rows
    head, token = rows % n_heads, rows // n_heads
    batch, time = (token // n_tokens).to(tl.int64), (token % n_tokens).to(tl.int64)
    x_offsets = batch * x_batch_stride + time * x_token_stride + head * x_head_stride
    first, second, rest = _load_pieces(x_ptr, x_offsets, is_row, WIDTH, HALF, BLOCK_HALF, BLOCK_REST)
    cos, sin = _load_angles(cos_ptr, sin_ptr, batch * angles_batch_stride + time * HALF, is_row, HALF, BLOCK_HALF)

    scale = tl.full([ROWS], 1.0, dtype=tl.float32)
    if HAS_NORM:
        scale = 1.0 / tl.sqrt(_dot(first, second, rest, first, second, rest) / WIDTH + eps)
    if HAS_TEMP:
        scale *= tl.exp(tl.load(temp_ptr + head, is_row, other=0.0).to(tl.float32))
    first, second, rest = first * scale[:, None], second * scale[:, None], rest * scale[:, None]

    _store_pieces(
        y_ptr,
        rows.to(tl.int64) * WIDTH,
        is_row,
        first * cos - second * sin,
        second * cos + first * sin,
        rest,
        WIDTH,
        HALF,
        BLOCK_HALF,
        BLOCK_REST,
    )


@triton.jit
def backward_kernel(
    grad_y_ptr,
    x_ptr,
    cos_ptr,
    sin_ptr,
    temp_ptr,
    grad_x_ptr,
    grad_temp_ptr,
    n_rows,
    n_tokens,
    n_heads,
    grad_y_batch_stride,
    grad_y_token_stride,
    grad_y_head_stride,
    x_batch_stride,
    x_token_stride,
    x_head_stride,
    angles_batch_stride,
    eps,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_TEMP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """grad_x, and in grad_temp (X,) each row's share of the gradient of its head's temperature, in float32.

    With n = x * rstd and g = exp(temp) * unrotate(grad_y): grad_x = rstd * (g - n * mean(g * n)), and sum(g * n) is the
    row's share. The norm is computed again from x, which is there anyway.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < n_rows
    head, token = rows % n_heads, rows // n_heads
    batch, time = (token // n_tokens).to(tl.int64), (token % n_tokens).to(tl.int64)
    x_offsets = batch * x_batch_stride + time * x_token_stride + head * x_head_stride
    grad_offsets = batch * grad_y_batch_stride + time * grad_y_token_stride + head * grad_y_head_stride
    grad_y_first, grad_y_second, rest_grad = _load_pieces(
        grad_y_ptr, grad_offsets, is_row, WIDTH, HALF, BLOCK_HALF, BLOCK_REST
    )
    cos, sin = _load_angles(cos_ptr, sin_ptr, batch * angles_batch_stride + time * HALF, is_row, HALF, BLOCK_HALF)
    first_grad = grad_y_first * cos + grad_y_second * sin
    second_grad = grad_y_second * cos - grad_y_first * sin
    if HAS_TEMP:
        factor = tl.exp(tl.load(temp_ptr + head, is_row, other=0.0).to(tl.float32))[:, None]
        first_grad, second_grad, rest_grad = first_grad * factor, second_grad * factor, rest_grad * factor

    if HAS_NORM or HAS_TEMP:
        first, second, rest = _load_pieces(x_ptr, x_offsets, is_row, WIDTH, HALF, BLOCK_HALF, BLOCK_REST)
        rstd = tl.full([ROWS], 1.0, dtype=tl.float32)
        if HAS_NORM:
            rstd = 1.0 / tl.sqrt(_dot(first, second, rest, first, second, rest) / WIDTH + eps)
        first, second, rest = first * rstd[:, None], second * rstd[:, None], rest * rstd[:, None]
        dot = _dot(first_grad, second_grad, rest_grad, first, second, rest)
        if HAS_TEMP:
            tl.store(grad_temp_ptr + rows, dot, is_row)
        if HAS_NORM:
            mean = (dot / WIDTH)[:, None]
            first_grad = rstd[:, None] * (first_grad - first * mean)
            second_grad = rstd[:, None] * (second_grad - second * mean)
            rest_grad = rstd[:, None] * (rest_grad - rest * mean)

    _store_pieces(
        grad_x_ptr,
        rows.to(tl.int64) * WIDTH,
        is_row,
        first_grad,
        second_grad,
        rest_grad,
        WIDTH,
        HALF,
        BLOCK_HALF,
        BLOCK_REST,
    )


def launch_constants(width: int, half: int, has_norm: bool, has_temp: bool) -> dict[str, Any]:
    """Compile-time arguments of both kernels, num_warps included."""
    block_half = triton.next_power_of_2(half)
    rest = width - 2 * half
    # Without a rest, one column that is masked: it is there for the compiler only, which drops it.
    block_rest = triton.next_power_of_2(rest) if rest > 0 else 1
    n_rows = max(1, TILE // (2 * block_half + block_rest))
    return {
        "WIDTH": width,
        "HALF": half,
        "HAS_NORM": has_norm,
        "HAS_TEMP": has_temp,
        "ROWS": 1 << (n_rows.bit_length() - 1),
        "BLOCK_HALF": block_half,
        "BLOCK_REST": block_rest,
        "num_warps": 4,
    }


@torch.library.custom_op("hydra::qk_norm_rope", mutates_args=())
def qk_norm_rope_op(
    x_BTNH: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor, norm_eps: float | None, temp_N: Tensor | None
) -> Tensor:
    """In the shape and dtype of x, contiguous."""
    _check(x_BTNH, cos_BT1R, sin_BT1R, temp_N)
    x_BTNH, cos_BT1R, sin_BT1R = _readable(x_BTNH), cos_BT1R.contiguous(), sin_BT1R.contiguous()
    n_batch, n_tokens, n_heads, width = x_BTNH.shape
    n_rows = n_batch * n_tokens * n_heads
    y_BTNH = torch.empty_like(x_BTNH, memory_format=torch.contiguous_format)
    if n_rows == 0:
        return y_BTNH
    constants = launch_constants(width, cos_BT1R.shape[-1], norm_eps is not None, temp_N is not None)
    forward_kernel[(triton.cdiv(n_rows, constants["ROWS"]),)](
        x_BTNH,
        cos_BT1R,
        sin_BT1R,
        x_BTNH if temp_N is None else temp_N.contiguous(),
        y_BTNH,
        n_rows,
        n_tokens,
        n_heads,
        *x_BTNH.stride()[:3],
        0 if cos_BT1R.shape[0] == 1 else cos_BT1R.stride(0),
        0.0 if norm_eps is None else norm_eps,
        **constants,
    )
    return y_BTNH


@qk_norm_rope_op.register_fake
def _(x_BTNH: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor, norm_eps: float | None, temp_N: Tensor | None) -> Tensor:
    return torch.empty_like(x_BTNH, memory_format=torch.contiguous_format)


@torch.library.custom_op("hydra::qk_norm_rope_backward", mutates_args=())
def qk_norm_rope_backward_op(
    grad_y_BTNH: Tensor,
    x_BTNH: Tensor,
    cos_BT1R: Tensor,
    sin_BT1R: Tensor,
    norm_eps: float | None,
    temp_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x (contiguous) and of temp; without one, an empty tensor."""
    grad_y_BTNH, x_BTNH = _readable(grad_y_BTNH), _readable(x_BTNH)
    cos_BT1R, sin_BT1R = cos_BT1R.contiguous(), sin_BT1R.contiguous()
    n_batch, n_tokens, n_heads, width = x_BTNH.shape
    n_rows = n_batch * n_tokens * n_heads
    grad_x_BTNH = torch.empty_like(x_BTNH, memory_format=torch.contiguous_format)
    grad_temp_YN = x_BTNH.new_empty((0 if temp_N is None else n_batch * n_tokens, n_heads), dtype=torch.float32)
    if n_rows > 0:
        constants = launch_constants(width, cos_BT1R.shape[-1], norm_eps is not None, temp_N is not None)
        backward_kernel[(triton.cdiv(n_rows, constants["ROWS"]),)](
            grad_y_BTNH,
            x_BTNH,
            cos_BT1R,
            sin_BT1R,
            x_BTNH if temp_N is None else temp_N.contiguous(),
            grad_x_BTNH,
            grad_temp_YN,
            n_rows,
            n_tokens,
            n_heads,
            *grad_y_BTNH.stride()[:3],
            *x_BTNH.stride()[:3],
            0 if cos_BT1R.shape[0] == 1 else cos_BT1R.stride(0),
            0.0 if norm_eps is None else norm_eps,
            **constants,
        )
    if temp_N is None:
        return grad_x_BTNH, x_BTNH.new_empty(0)
    return grad_x_BTNH, grad_temp_YN.sum(dim=0).to(temp_N.dtype)


@qk_norm_rope_backward_op.register_fake
def _(
    grad_y_BTNH: Tensor,
    x_BTNH: Tensor,
    cos_BT1R: Tensor,
    sin_BT1R: Tensor,
    norm_eps: float | None,
    temp_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    grad_x_BTNH = torch.empty_like(x_BTNH, memory_format=torch.contiguous_format)
    return grad_x_BTNH, x_BTNH.new_empty(0) if temp_N is None else temp_N.new_empty(temp_N.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_BTNH, cos_BT1R, sin_BT1R, ctx.norm_eps, temp_N = inputs
    ctx.save_for_backward(x_BTNH, cos_BT1R, sin_BT1R, temp_N)


def _backward(ctx: Any, grad_y_BTNH: Tensor) -> tuple[Tensor | None, ...]:
    x_BTNH, cos_BT1R, sin_BT1R, temp_N = ctx.saved_tensors
    grad_x_BTNH, grad_temp_N = qk_norm_rope_backward_op(grad_y_BTNH, x_BTNH, cos_BT1R, sin_BT1R, ctx.norm_eps, temp_N)
    return grad_x_BTNH, None, None, None, None if temp_N is None else grad_temp_N


qk_norm_rope_op.register_autograd(_backward, setup_context=_setup_context)


def _readable(x_BTNH: Tensor) -> Tensor:
    """x if its heads are contiguous in themselves, whatever the strides between them; else a copy that is."""
    return x_BTNH if x_BTNH.stride(-1) == 1 else x_BTNH.contiguous()


def _check(x_BTNH: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor, temp_N: Tensor | None) -> None:
    check_inputs("qk_norm_rope", x=x_BTNH, cos=cos_BT1R, sin=sin_BT1R, **({} if temp_N is None else {"temp": temp_N}))
    n_batch, n_tokens, n_heads, width = x_BTNH.shape
    if cos_BT1R.dtype != torch.float32 or sin_BT1R.dtype != torch.float32:
        raise ConfigError(
            f"qk_norm_rope must get angles in float32, but got {cos_BT1R.dtype} and {sin_BT1R.dtype}; take those of "
            "hydra.layers.rotary.compute_rotary"
        )
    half = cos_BT1R.shape[-1]
    shape = (cos_BT1R.shape[0], n_tokens, 1, half)
    assert cos_BT1R.shape == sin_BT1R.shape == shape and cos_BT1R.shape[0] in (1, n_batch), (x_BTNH.shape, shape)
    assert temp_N is None or temp_N.shape == (n_heads,), temp_N
    if not 1 <= half <= width // 2 or width > MAX_HEAD_WIDTH or x_BTNH.numel() // width > MAX_ROWS:
        raise ConfigError(
            f"qk_norm_rope must get heads of at most {MAX_HEAD_WIDTH} channels, up to half of them in pairs, and at "
            f"most {MAX_ROWS} heads of tokens, but got {tuple(x_BTNH.shape)} and {half} pairs; ask for kernels=torch"
        )


def qk_norm_rope(
    x_BTNH: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor, norm_eps: float | None, temp_N: Tensor | None
) -> Tensor:
    """See hydra.kernels.qk_norm_rope."""
    return qk_norm_rope_op(x_BTNH, cos_BT1R, sin_BT1R, norm_eps, temp_N)


def aot_cases() -> list[AotCase]:
    """Heads of 64 and 128 channels as in the presets: plain, with gqa's norm, with ccgqa's norm and temperature."""
    cases = []
    forward: dict[str, Any]
    backward: dict[str, Any]
    forms = [("gqa", False, False, 1), ("gqa qk_norm", True, False, 1), ("ccgqa", True, True, 2)]
    for width in (64, 128):
        for name, has_norm, has_temp, rotated_share in forms:
            half = width // (2 * rotated_share)
            constants = launch_constants(width, half, has_norm, has_temp)
            num_warps = constants.pop("num_warps")
            shape = {"n_rows": 16384 * 8, "n_tokens": 1024, "n_heads": 8}
            x_strides = {"x_batch_stride": 1024 * 8 * width, "x_token_stride": 8 * width, "x_head_stride": width}
            angles = {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "temp_ptr": "*bf16"}
            last = {**shape, **x_strides, "angles_batch_stride": 0, "eps": "fp32"}
            forward = {"x_ptr": "*bf16", **angles, "y_ptr": "*bf16", **last}
            backward = {"grad_y_ptr": "*bf16", "x_ptr": "*bf16", **angles, "grad_x_ptr": "*bf16"}
            backward |= {"grad_temp_ptr": "*fp32", **last}
            backward |= {name.replace("x_", "grad_y_"): stride for name, stride in x_strides.items()}
            for kernel, arguments in ((forward_kernel, forward), (backward_kernel, backward)):
                cases.append(AotCase(kernel, arguments, constants, num_warps, label=f"bf16 {name} H={width}"))
    return cases

"""The two convolutions of compressed convolutional attention and the query-key mean, as operators of torch.

B batch, T new tokens, R = k0 + k1 - 2 tokens that the convolutions look back, P = R + T, N query heads, K key/value
heads, M = N + K, H head width, C = M H. I input and O output channels of a head, J = k1 taps, E pieces.
"""

import dataclasses
from typing import Any

import torch
import triton
from torch import Tensor

from hydra.errors import ConfigError
from hydra.kernels._triton.cca_convolution_kernels import (
    forward_kernel,
    grad_input_kernel,
    grad_middle_kernel,
    grad_weight_kernel,
)
from hydra.kernels._triton.launch import TILE, AotCase, check_inputs

MAX_HEAD_WIDTH = 256
FORWARD_WARPS = 8
"""Its operands are made in registers, for which those of four warps do not suffice everywhere."""
MAX_PIECES = 16
"""Pieces of the gradient of conv1's weights: each is as large as they are, in float32."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the kernels cut tokens and the channels of a head."""

    block_t: int
    block_h: int
    precision: str
    """How products of float32 are computed: as three of tf32 each, which keeps their digits and uses matrix units."""


def choose_launch(width: int, dtype: torch.dtype) -> Launch:
    """For heads of this width. Operands of tf32 products come in two parts each: registers hold half as many."""
    most = 32 if dtype == torch.float32 else 64
    block_h = min(max(triton.next_power_of_2(width), 16), most)
    return Launch(block_t=most, block_h=block_h, precision="tf32x3" if dtype == torch.float32 else "ieee")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of one call."""

    n_batch: int
    n_tokens: int
    n_missing: int
    n_query_heads: int
    n_kv_heads: int
    width: int
    n_taps_0: int
    n_taps_1: int

    @property
    def n_channels(self) -> int:
        """Of queries and keys together."""
        return (self.n_query_heads + self.n_kv_heads) * self.width

    def constants(self, is_key: bool, has_documents: bool) -> dict[str, Any]:
        """What every kernel is compiled for."""
        return {
            "IS_KEY": is_key,
            "N_QUERIES": self.n_query_heads,
            "N_KEYS": self.n_kv_heads,
            "WIDTH": self.width,
            "TAPS_0": self.n_taps_0,
            "TAPS_1": self.n_taps_1,
            "HAS_DOCUMENTS": has_documents,
        }


def _shape_of(u: Tensor, weight_0_C1J: Tensor, weight_1_CHJ: Tensor, n_tokens: int, n_kv_heads: int) -> Shape:
    n_channels, width, n_taps_1 = weight_1_CHJ.shape
    n_taps_0 = weight_0_C1J.shape[2]
    n_missing = n_taps_0 + n_taps_1 - 2 + n_tokens - u.shape[1]
    n_query_heads = n_channels // width - n_kv_heads
    return Shape(u.shape[0], n_tokens, n_missing, n_query_heads, n_kv_heads, width, n_taps_0, n_taps_1)


def _tap_matrices(weight_1_CHJ: Tensor) -> Tensor:
    """(J, M, O, I), whose rows are contiguous."""
    n_channels, width, n_taps = weight_1_CHJ.shape
    return weight_1_CHJ.view(n_channels // width, width, width, n_taps).permute(3, 0, 1, 2).contiguous()


def _fold_bias(bias_0_C: Tensor, weight_1_CHJ: Tensor, bias_1_C: Tensor) -> Tensor:
    """What both biases add to every output, in float32: conv0's stands also at the places before a document."""
    width = weight_1_CHJ.shape[1]
    bias_0_M1H = bias_0_C.float().view(-1, 1, width)
    sums_MOI = weight_1_CHJ.float().sum(-1).view(-1, width, width)
    return bias_1_C.float() + (sums_MOI * bias_0_M1H).sum(-1).flatten()


@torch.library.custom_op("hydra::cca_convolution", mutates_args=())
def cca_convolution_op(
    u: Tensor, weight_0_C1J: Tensor, bias_0_C: Tensor, weight_1_CHJ: Tensor, bias_1_C: Tensor, ids_BP: Tensor | None,
    n_tokens: int, n_kv_heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q_BTNH and k_BTKH, contiguous, from u of T tokens, or of P with those before them."""
    u, weight_0_C1J, weight_1_CHJ = u.contiguous(), weight_0_C1J.contiguous(), weight_1_CHJ.contiguous()
    shape = _shape_of(u, weight_0_C1J, weight_1_CHJ, n_tokens, n_kv_heads)
    launch = choose_launch(shape.width, u.dtype)
    taps_JMOI, bias_C = _tap_matrices(weight_1_CHJ), _fold_bias(bias_0_C, weight_1_CHJ, bias_1_C)
    outs = []
    for is_key, n_heads in ((False, shape.n_query_heads), (True, shape.n_kv_heads)):
        out = u.new_empty(shape.n_batch, n_tokens, n_heads, shape.width)
        n_programs = n_heads * triton.cdiv(shape.width, launch.block_h)
        forward_kernel[(triton.cdiv(n_tokens, launch.block_t), n_programs, shape.n_batch)](
            u, weight_0_C1J, taps_JMOI, bias_C, ids_BP, out, n_tokens, shape.n_missing,
            **shape.constants(is_key, ids_BP is not None), BLOCK_T=launch.block_t, BLOCK_I=launch.block_h,
            BLOCK_O=launch.block_h, PRECISION=launch.precision, num_warps=FORWARD_WARPS, num_stages=2,
        )  # fmt: skip
        outs.append(out)
    return outs[0], outs[1]


@cca_convolution_op.register_fake
def _(
    u: Tensor, weight_0_C1J: Tensor, bias_0_C: Tensor, weight_1_CHJ: Tensor, bias_1_C: Tensor, ids_BP: Tensor | None,
    n_tokens: int, n_kv_heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n_channels, width, _ = weight_1_CHJ.shape
    n_query_heads = n_channels // width - n_kv_heads
    q_BTNH = u.new_empty(u.shape[0], n_tokens, n_query_heads, width)
    return q_BTNH, u.new_empty(u.shape[0], n_tokens, n_kv_heads, width)


@torch.library.custom_op("hydra::cca_convolution_backward", mutates_args=())
def cca_convolution_backward_op(
    grad_q_BTNH: Tensor, grad_k_BTKH: Tensor, u: Tensor, weight_0_C1J: Tensor, bias_0_C: Tensor, weight_1_CHJ: Tensor,
    ids_BP: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u (contiguous), of the weights and biases of conv0 and of those of conv1, in their dtypes."""
    grads = grad_q_BTNH.contiguous(), grad_k_BTKH.contiguous()
    u, weight_0_C1J, weight_1_CHJ = u.contiguous(), weight_0_C1J.contiguous(), weight_1_CHJ.contiguous()
    shape = _shape_of(u, weight_0_C1J, weight_1_CHJ, grad_q_BTNH.shape[1], grad_k_BTKH.shape[2])
    grad_u, shares_0 = _backward_inputs(shape, *grads, u, weight_0_C1J, weight_1_CHJ, ids_BP)
    shares_1 = _backward_weights(shape, *grads, u, weight_0_C1J, ids_BP)

    grad_weight_0_C1J = shares_0.sum(0).T[:, None].to(weight_0_C1J.dtype)
    # Every output has bias_1 + (sum of taps) bias_0 added to it.
    grad_bias_C = torch.cat([grad.sum((0, 1), dtype=torch.float32).flatten() for grad in grads])
    grad_bias_MO1 = grad_bias_C.view(-1, shape.width, 1)
    bias_0_M1I = bias_0_C.float().view(-1, 1, shape.width)
    sums_MOI = weight_1_CHJ.float().sum(-1).view(-1, shape.width, shape.width)
    grad_bias_0_C = (sums_MOI * grad_bias_MO1).sum(1).flatten()
    grad_taps_JMOI = shares_1.sum(0) + grad_bias_MO1 * bias_0_M1I
    grad_weight_1_CHJ = grad_taps_JMOI.flatten(1, 2).permute(1, 2, 0)
    return (
        grad_u,
        grad_weight_0_C1J.contiguous(),
        grad_bias_0_C.to(bias_0_C.dtype),
        grad_weight_1_CHJ.to(weight_1_CHJ.dtype, memory_format=torch.contiguous_format),
        grad_bias_C.to(bias_0_C.dtype),
    )


def _backward_inputs(
    shape: Shape, grad_q_BTNH: Tensor, grad_k_BTKH: Tensor, u: Tensor, weight_0_C1J: Tensor, weight_1_CHJ: Tensor,
    ids_BP: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of u, and shares of that of conv0's weights, (E, k0, C)."""
    launch = choose_launch(shape.width, u.dtype)
    n_places = shape.n_tokens + shape.n_taps_0 + shape.n_taps_1 - 2
    taps_JMOI, n_blocks = _tap_matrices(weight_1_CHJ), triton.cdiv(n_places, launch.block_t)
    grad_z_BPC = u.new_empty(shape.n_batch, n_places, shape.n_channels)
    shares_EJC = u.new_empty(shape.n_batch * n_blocks, shape.n_taps_0, shape.n_channels, dtype=torch.float32)
    grad_u = torch.empty_like(u)
    for is_key, grad in ((False, grad_q_BTNH), (True, grad_k_BTKH)):
        constants = shape.constants(is_key, ids_BP is not None)
        n_programs = grad.shape[2] * triton.cdiv(shape.width, launch.block_h)
        grad_middle_kernel[(n_blocks, n_programs, shape.n_batch)](
            grad, u, taps_JMOI, ids_BP, grad_z_BPC, shares_EJC, shape.n_tokens, shape.n_missing, **constants,
            BLOCK_T=launch.block_t, BLOCK_I=launch.block_h, BLOCK_O=launch.block_h, PRECISION=launch.precision,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    block_h = triton.next_power_of_2(shape.width)
    block_t = max(1, TILE // block_h)
    for is_key, grad in ((False, grad_q_BTNH), (True, grad_k_BTKH)):
        grad_input_kernel[(triton.cdiv(u.shape[1], block_t), grad.shape[2], shape.n_batch)](
            grad_z_BPC, grad_q_BTNH, grad_k_BTKH, weight_0_C1J, ids_BP, grad_u, shape.n_tokens, shape.n_missing,
            **shape.constants(is_key, ids_BP is not None), BLOCK_T=block_t, BLOCK_H=block_h, num_warps=4,
        )  # fmt: skip
    return grad_u, shares_EJC


def _backward_weights(
    shape: Shape, grad_q_BTNH: Tensor, grad_k_BTKH: Tensor, u: Tensor, weight_0_C1J: Tensor, ids_BP: Tensor | None
) -> Tensor:
    """Shares of the gradient of conv1's weights, (E, J, M, O, I)."""
    launch, width = choose_launch(shape.width, u.dtype), shape.width
    n_pieces = min(MAX_PIECES, shape.n_batch * triton.cdiv(shape.n_tokens, launch.block_t))
    shares = u.new_empty(n_pieces, shape.n_taps_1, shape.n_channels // width, width, width, dtype=torch.float32)
    for is_key, grad in ((False, grad_q_BTNH), (True, grad_k_BTKH)):
        n_programs = grad.shape[2] * triton.cdiv(width, launch.block_h) ** 2
        grad_weight_kernel[(n_pieces, n_programs, shape.n_taps_1)](
            grad, u, weight_0_C1J, ids_BP, shares, shape.n_batch, shape.n_tokens, shape.n_missing,
            **shape.constants(is_key, ids_BP is not None), BLOCK_T=launch.block_t, BLOCK_I=launch.block_h,
            BLOCK_O=launch.block_h, PRECISION=launch.precision, num_warps=4, num_stages=2,
        )  # fmt: skip
    return shares


@cca_convolution_backward_op.register_fake
def _(
    grad_q_BTNH: Tensor, grad_k_BTKH: Tensor, u: Tensor, weight_0_C1J: Tensor, bias_0_C: Tensor, weight_1_CHJ: Tensor,
    ids_BP: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    like = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, weight_0_C1J, bias_0_C, weight_1_CHJ)
    ]
    return like[0], like[1], like[2], like[3], torch.empty_like(like[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    u, weight_0_C1J, bias_0_C, weight_1_CHJ, _, ids_BP, _, _ = inputs
    ctx.save_for_backward(u, weight_0_C1J, bias_0_C, weight_1_CHJ, ids_BP)


def _backward(ctx: Any, grad_q_BTNH: Tensor, grad_k_BTKH: Tensor) -> tuple[Tensor | None, ...]:
    return *cca_convolution_backward_op(grad_q_BTNH, grad_k_BTKH, *ctx.saved_tensors), None, None, None


cca_convolution_op.register_autograd(_backward, setup_context=_setup_context)


def cca_convolution(
    u_BTC: Tensor, past_u_BRC: Tensor | None, weight_0_C1J: Tensor, bias_0_C: Tensor, weight_1_CHJ: Tensor,
    bias_1_C: Tensor, n_kv_heads: int, document_ids_BP: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See hydra.kernels.cca_convolution.

    Raises:
        ConfigError: a dtype is not float32, float16 or bfloat16, or heads are wider than MAX_HEAD_WIDTH.
    """
    check_inputs("cca_convolution", u=u_BTC, weight_0=weight_0_C1J, weight_1=weight_1_CHJ)
    if weight_1_CHJ.shape[1] > MAX_HEAD_WIDTH:
        raise ConfigError(
            f"cca_convolution must get heads of at most {MAX_HEAD_WIDTH} channels from kernels=triton, but got "
            f"{weight_1_CHJ.shape[1]}; ask for kernels=torch"
        )
    u = u_BTC if past_u_BRC is None else torch.cat([past_u_BRC, u_BTC], dim=1)
    ids_BP = None if document_ids_BP is None else document_ids_BP.contiguous()
    return cca_convolution_op(u, weight_0_C1J, bias_0_C, weight_1_CHJ, bias_1_C, ids_BP, u_BTC.shape[1], n_kv_heads)


def aot_cases() -> list[AotCase]:
    """Packed rows: CCGQA of 8 query and 2 key heads at head widths 64 and 128 in bfloat16, one of them in float32."""
    cases = []
    sizes: dict[str, str | int | float] = {"n_tokens": 4096, "n_missing": 2}
    for width, dtype, key_forms in [(64, "bf16", (True, False)), (128, "bf16", (True, False)), (64, "fp32", (True,))]:
        x, launch = f"*{dtype}", choose_launch(width, torch.float32 if dtype == "fp32" else torch.bfloat16)
        # Tiles of 32 are too small for the instructions of a whole warp group.
        instruction = "mma.sync" if dtype == "fp32" else "dot"
        u_and_taps = {"u_ptr": x, "weight_1_ptr": x, "ids_ptr": "*i64"}
        forward = {**u_and_taps, "weight_0_ptr": x, "bias_ptr": "*fp32", "out_ptr": x, **sizes}
        middle = {**u_and_taps, "grad_ptr": x, "grad_z_ptr": x, "pieces_ptr": "*fp32", **sizes}
        inputs = {"grad_z_ptr": x, "grad_q_ptr": x, "grad_k_ptr": x, "weight_0_ptr": x, "ids_ptr": "*i64",
                  "grad_u_ptr": x, **sizes}  # fmt: skip
        weights = {"grad_ptr": x, "u_ptr": x, "weight_0_ptr": x, "ids_ptr": "*i64", "pieces_ptr": "*fp32",
                   "n_batch": 4, **sizes}  # fmt: skip
        blocks = {"BLOCK_T": launch.block_t, "BLOCK_I": launch.block_h, "BLOCK_O": launch.block_h}
        for is_key in key_forms:
            constants = Shape(4, 4096, 2, 8, 2, width, 2, 2).constants(is_key, has_documents=True)
            with_products = {**constants, **blocks, "PRECISION": launch.precision}
            label = f"{dtype} H={width} {'keys' if is_key else 'queries'}"
            cases.append(AotCase(forward_kernel, forward, with_products, FORWARD_WARPS, 2, instruction, label))
            if is_key:  # for queries these differ in the number of heads alone
                cases.append(AotCase(grad_middle_kernel, middle, with_products, 4, 2, instruction, label))
                cases.append(AotCase(grad_weight_kernel, weights, with_products, 4, 2, instruction, label))
            constants |= {"BLOCK_T": TILE // width, "BLOCK_H": width}
            cases.append(AotCase(grad_input_kernel, inputs, constants, 4, label=label))
    return cases

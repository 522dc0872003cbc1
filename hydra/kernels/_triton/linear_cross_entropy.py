"""Linear cross-entropy: torch's matrix products, and one kernel that turns logits into losses and their own gradients.

The gradients of input and weight are computed with the loss, some tokens at a time, and scaled by the backward pass, as
in hydra.kernels.linear_cross_entropy: making the logits anew there would cost one more product of the head's size.

X tokens, C tokens of a chunk, D model width, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydra.kernels._triton.launch import AotCase, check_inputs

MAX_LOGITS = 2**27
"""Logits that are held at a time, 256 MiB in bfloat16: products of that size fill a GPU."""
MIN_CHUNK = 256
"""Fewer tokens at a time would leave matrix products too thin to be fast."""
MAX_BLOCK = 4096
"""Logits of a row that a program holds at a time."""
NUM_WARPS = 16
"""Each thread has eight places of a block, with a maximum and a sum each; with twice as many they spill on sm_120."""


@triton.jit
def softmax_kernel(
    logits_ptr, targets_ptr, losses_ptr, vocab_size,
    IGNORE_INDEX: tl.constexpr, NEEDS_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses (C,) = logsumexp - logit of the target; logits (C, V) <- softmax - one-hot. Zero where invalid."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab_size
    target = tl.load(targets_ptr + row)
    is_valid = target != IGNORE_INDEX
    # Before anything is written over it.
    target_logit = tl.load(logits_ptr + tl.where(is_valid, target, 0)).to(tl.float32)

    # In each place of a block a maximum and a sum of its own; the first maximum is finite so that no inf - inf arises.
    maxima = tl.full([BLOCK], -3.0e38, dtype=tl.float32)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, vocab_size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + columns, columns < vocab_size, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(maxima, logits)
        sums = sums * tl.exp(maxima - larger) + tl.exp(logits - larger)
        maxima = larger
    maximum = tl.max(maxima, axis=0)
    log_sum = maximum + tl.log(tl.sum(sums * tl.exp(maxima - maximum), axis=0))
    tl.store(losses_ptr + row, tl.where(is_valid, log_sum - target_logit, 0.0))

    if NEEDS_GRAD:
        for first in range(0, vocab_size, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            logits = tl.load(logits_ptr + columns, columns < vocab_size, other=float("-inf")).to(tl.float32)
            grad = tl.exp(logits - log_sum) - tl.where(columns == target, 1.0, 0.0)
            grad = tl.where(is_valid, grad, 0.0)
            tl.store(logits_ptr + columns, grad.to(logits_ptr.dtype.element_ty), columns < vocab_size)


def chunk_length(vocab_size: int) -> int:
    """Tokens whose logits are held at a time."""
    return max(MIN_CHUNK, MAX_LOGITS // vocab_size)


def block_of(vocab_size: int) -> int:
    """Logits of a row that a program holds at a time."""
    return min(triton.next_power_of_2(vocab_size), MAX_BLOCK)


@torch.library.custom_op("hydra::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    x_XD: Tensor, weight_VD: Tensor, targets_X: Tensor, ignore_index: int, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss in float32, and its gradients by x and weight; without needs_grad those are empty."""
    vocab_size, length = weight_VD.shape[0], chunk_length(weight_VD.shape[0])
    losses_X = torch.empty(x_XD.shape[0], dtype=torch.float32, device=x_XD.device)
    grad_x_XD = x_XD.new_empty(x_XD.shape if needs_grad else 0)
    grad_weight_VD = None
    for start in range(0, x_XD.shape[0], length):
        x_CD, targets_C = x_XD[start : start + length], targets_X[start : start + length].contiguous()
        logits_CV = x_CD @ weight_VD.T
        softmax_kernel[(x_CD.shape[0],)](
            logits_CV, targets_C, losses_X[start : start + length], vocab_size,
            IGNORE_INDEX=ignore_index, NEEDS_GRAD=needs_grad, BLOCK=block_of(vocab_size), num_warps=NUM_WARPS,
        )  # fmt: skip
        if needs_grad:
            torch.mm(logits_CV, weight_VD, out=grad_x_XD[start : start + length])
            part_VD = logits_CV.T @ x_CD
            if x_XD.shape[0] <= length:  # one chunk is all there is: no running sum in float32
                grad_weight_VD = part_VD
            elif grad_weight_VD is None:
                grad_weight_VD = part_VD.to(torch.float32)
            else:
                grad_weight_VD += part_VD
    if grad_weight_VD is None:
        grad_weight_VD = torch.zeros_like(weight_VD) if needs_grad else weight_VD.new_empty(0)
    return losses_X.sum(), grad_x_XD, grad_weight_VD.to(weight_VD.dtype)


@linear_cross_entropy_op.register_fake
def _(
    x_XD: Tensor, weight_VD: Tensor, targets_X: Tensor, ignore_index: int, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x_XD, grad_weight_VD = (x.new_empty(x.shape if needs_grad else 0) for x in (x_XD, weight_VD))
    return x_XD.new_empty((), dtype=torch.float32), grad_x_XD, grad_weight_VD


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    # Without this, zeros of the size of the weight would be made for the gradients of the gradients.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    # `grad` is one number, mostly 1 / tokens of a step: it multiplies in float32 without making that the dtype.
    return *(saved * grad for saved in ctx.saved_tensors), None, None, None


linear_cross_entropy_op.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy(x_XD: Tensor, weight_VD: Tensor, targets_X: Tensor, ignore_index: int) -> Tensor:
    """See hydra.kernels.linear_cross_entropy.

    Raises:
        ConfigError: a dtype is not float32, float16 or bfloat16.
    """
    check_inputs("linear_cross_entropy", x=x_XD, weight=weight_VD)
    needs_grad = torch.is_grad_enabled() and (x_XD.requires_grad or weight_VD.requires_grad)
    return linear_cross_entropy_op(x_XD, weight_VD, targets_X, ignore_index, needs_grad)[0]


def aot_cases() -> list[AotCase]:
    """The presets' vocabulary, and GPT-2's, whose rows start anywhere; the first without gradients too."""
    cases = []
    for vocab_size, dtype, needs_grad in [
        (32768, "bf16", True), (50257, "bf16", True), (32768, "bf16", False), (4096, "fp32", True)
    ]:  # fmt: skip
        arguments = {"logits_ptr": f"*{dtype}", "targets_ptr": "*i64", "losses_ptr": "*fp32", "vocab_size": vocab_size}
        constants = {"IGNORE_INDEX": -100, "NEEDS_GRAD": needs_grad, "BLOCK": block_of(vocab_size)}
        label = f"{dtype} V={vocab_size}{'' if needs_grad else ' loss only'}"
        cases.append(AotCase(softmax_kernel, arguments, constants, NUM_WARPS, label=label))
    return cases

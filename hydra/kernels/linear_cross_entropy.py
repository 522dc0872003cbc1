"""Cross-entropy of a linear head that never holds all logits: they are made, used and dropped some tokens at a time.

The gradient of the logits is known as soon as they are (softmax minus one-hot), so the forward pass computes the
gradients of input and weight too and the backward pass only scales them (Hsu et al., Liger, arXiv 2410.10989, 3.2).

X tokens (batch and time flattened), C tokens of a chunk, D model width, V vocabulary.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Target where nothing is to be predicted."""

MAX_LOGITS = 2**22
"""Logits that are held at a time: 8 MiB in bfloat16, which a level-3 cache takes."""
MIN_CHUNK = 256
"""Fewer tokens at a time would leave matrix products too thin to be fast."""


def linear_cross_entropy(
    x_XD: Tensor, weight_VD: Tensor, targets_X: Tensor, is_compiled: bool = False, kernels: str = "torch"
) -> Tensor:
    """Sum of -log softmax(x W^T)[target] over the targets that are not IGNORE_INDEX.

    Args:
        x_XD: any floating dtype; matrix products are computed in it.
        weight_VD: in the dtype of x_XD.
        targets_X: int64, below V or IGNORE_INDEX.
        is_compiled: whether the element-wise part of kernels=torch goes through torch.compile, which fuses it.
        kernels: one of hydra.kernels.dispatch.KERNELS; what serves the element-wise part.
    Returns:
        A scalar in nats, in float32 (float64 for float64 input). It can be differentiated once.
    Raises:
        ConfigError: kernels=triton cannot take this dtype.
    """
    if kernels == "triton":
        from hydra.kernels._triton import linear_cross_entropy as triton_kernels

        return triton_kernels.linear_cross_entropy(x_XD, weight_VD, targets_X, IGNORE_INDEX)
    return _LinearCrossEntropy.apply(x_XD, weight_VD, targets_X, is_compiled)


def chunk_length(vocab_size: int) -> int:
    """Tokens whose logits are held at a time."""
    return max(MIN_CHUNK, MAX_LOGITS // vocab_size)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, weight_VD: Tensor, targets_X: Tensor, is_compiled: bool) -> Tensor:
        compute_dtype = torch.promote_types(x_XD.dtype, torch.float32)
        loss = torch.zeros((), dtype=compute_dtype, device=x_XD.device)
        needs_grad = any(ctx.needs_input_grad)
        grad_x_XD = torch.empty_like(x_XD) if needs_grad else None
        grad_weight_VD = None
        length = chunk_length(weight_VD.shape[0])
        for start in range(0, x_XD.shape[0], length):
            x_CD, targets_C = x_XD[start : start + length], targets_X[start : start + length]
            logits_CV = x_CD @ weight_VD.T
            if grad_x_XD is None:
                loss += sum_loss(logits_CV, targets_C)
                continue
            chunk_loss, grad_logits_CV = _pointwise(is_compiled)(logits_CV, targets_C)
            loss += chunk_loss
            torch.mm(grad_logits_CV, weight_VD, out=grad_x_XD[start : start + length])
            part_VD = grad_logits_CV.T @ x_CD
            if x_XD.shape[0] <= length:  # one chunk is all there is: no running sum in float32
                grad_weight_VD = part_VD
            elif grad_weight_VD is None:
                grad_weight_VD = part_VD.to(compute_dtype)
            else:
                grad_weight_VD += part_VD
        if grad_weight_VD is not None:
            ctx.save_for_backward(grad_x_XD, grad_weight_VD.to(weight_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # `grad` is one number, mostly 1 / tokens of a step: it multiplies in float32 without making that the dtype.
        return (*(saved * grad for saved in ctx.saved_tensors), None, None)


def sum_loss(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """The loss of one chunk, without gradients."""
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits_CV, targets_C, ignore_index=IGNORE_INDEX, reduction="sum")


def loss_and_gradient(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of one chunk and its gradient with respect to the logits, in their dtype."""
    computed_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    is_valid_C = targets_C != IGNORE_INDEX
    log_sum_C1 = computed_CV.logsumexp(-1, keepdim=True)
    indices_C1 = targets_C.where(is_valid_C, 0)[:, None]
    loss_C = (log_sum_C1 - computed_CV.gather(-1, indices_C1))[:, 0].where(is_valid_C, 0.0)
    is_target_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == indices_C1
    grad_CV = ((computed_CV - log_sum_C1).exp() - is_target_CV.to(computed_CV.dtype)) * is_valid_C[:, None]
    return loss_C.sum(), grad_CV.to(logits_CV.dtype)


@cache
def _compiled_loss_and_gradient() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(loss_and_gradient, fullgraph=True, dynamic=False)


def _pointwise(is_compiled: bool) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return _compiled_loss_and_gradient() if is_compiled else loss_and_gradient

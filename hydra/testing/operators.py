"""An operator against its slow reference: the output and every gradient, with NaN around what it may read."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hydra.testing.specs import random_activations
from hydra.testing.tolerances import assert_close, relative_error


def inside_nan(tensor: Tensor, margin: int = 3) -> Tensor:
    """The same numbers as a leaf inside of larger memory that is NaN: before, behind and, for matrices, beside rows."""
    if tensor.ndim < 2:
        memory = torch.full((len(tensor) + 2 * margin,), torch.nan, dtype=tensor.dtype, device=tensor.device)
        inner = memory[margin : margin + len(tensor)]
    else:
        *others, n_rows, width = tensor.shape
        shape = (*others, n_rows + 2, width + 2 * margin)
        memory = torch.full(shape, torch.nan, dtype=tensor.dtype, device=tensor.device)
        inner = memory[..., 1 : 1 + n_rows, margin : margin + width]
    inner.copy_(tensor)
    return inner


def between_nan(tensor: Tensor) -> Tensor:
    """The same numbers, contiguous, with 8,192 times NaN before and behind: for kernels that copy anything strided."""
    return inside_nan(tensor.flatten(), margin=8192).view(tensor.shape)


def check_operator(
    fast: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor], names: Sequence[str]
) -> dict[str, float]:
    """Compare output and every gradient of fast(*inputs) with those of the reference in float64.

    The gradient of the output comes with strides of its own, inside NaN. Everything is compared in the dtype of the
    first input.

    Args:
        inputs: leaves, differentiated.
        names: of the inputs, for messages.
    Returns:
        Relative errors, as hydra.testing.tolerances measures them: of the output, and of each gradient by its name.
    """
    dtype = inputs[0].dtype
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = fast(*inputs)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = reference(*exact)
    assert out.dtype == dtype, out.dtype
    assert_close(out, expected, dtype, "output")
    errors = {"output": relative_error(out, expected, dtype)}

    weight = random_activations(*out.shape, dtype=dtype, seed=17).to(out.device)
    grads = torch.autograd.grad(out, inputs, inside_nan(weight))
    expected_grads = torch.autograd.grad(expected, exact, weight.double())
    for name, grad, expected_grad, tensor in zip(names, grads, expected_grads, inputs, strict=True):
        assert grad.dtype == tensor.dtype, (name, grad.dtype)
        assert_close(grad, expected_grad, dtype, f"gradient of {name}")
        errors[name] = relative_error(grad, expected_grad, dtype)
    return errors


class CountedOperators(TorchDispatchMode):
    """Counts the operators of `hydra` that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "hydra":
            self.counts[func._schema.name.removeprefix("hydra::")] += 1
        return func(*args, **(kwargs or {}))

"""Muon with all matrices of a shape orthogonalised at once.

torch.optim.Muon computes the same one matrix at a time; for small models the products are then too small to fill a
processor, and the optimizer takes as long as the gradient (tests compare the two).

M matrices of a batch, R rows, C columns, R <= C.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that draws singular values from (0, 1] to about 1 in five rounds (Jordan et al. 2024)."""
N_ROUNDS = 5
EPS = 1e-7


def orthogonalise(x_MRC: Tensor) -> Tensor:
    """Each matrix with its singular values drawn to about 1 (between 0.7 and 1.2): a x + (b A + c A^2) x, A = x x^T.

    Computed in the dtype of x_MRC, which has no more rows than columns.
    """
    a, b, c = COEFFICIENTS
    # The Frobenius norm is no less than the largest singular value, which must not be above 1.
    x_MRC = x_MRC / torch.linalg.vector_norm(x_MRC, dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(N_ROUNDS):
        gram_MRR = torch.bmm(x_MRC, x_MRC.transpose(1, 2))
        polynomial_MRR = torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=b, alpha=c)
        x_MRC = torch.baddbmm(x_MRC, polynomial_MRR, x_MRC, beta=a)
    return x_MRC


class Muon(Optimizer):
    """Momentum (Nesterov), orthogonalised, for the hidden matrices of a model (Jordan et al. 2024).

    A matrix of A rows and B columns is moved by lr * sqrt(max(1, A / B)), so that all shapes get updates of one size.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        """Take matrices only; `dtype` is that of the orthogonalisation (bfloat16 where it is fast: it suffices)."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "dtype": dtype})
        for group in self.param_groups:
            assert all(parameter.ndim == 2 for parameter in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault((min(parameter.shape), max(parameter.shape)), []).append(parameter)
            for parameters in by_shape.values():
                self._step_batch(parameters, group)

    def _step_batch(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradients: list[Tensor] = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1.0 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
        flat_MRC = orthogonalise(torch.stack([_wide(update) for update in updates]).to(group["dtype"]))
        if group["weight_decay"]:
            torch._foreach_mul_(list[Tensor](parameters), 1.0 - group["lr"] * group["weight_decay"])
        for parameter, update_RC in zip(parameters, flat_MRC, strict=True):
            n_rows, n_columns = parameter.shape
            rate = group["lr"] * math.sqrt(max(1.0, n_rows / n_columns))
            parameter.add_(update_RC if n_rows <= n_columns else update_RC.T, alpha=-rate)


def _wide(x: Tensor) -> Tensor:
    return x if x.shape[0] <= x.shape[1] else x.T

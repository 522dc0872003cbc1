"""The gate of SwiGLU, in float64 and step by step."""

from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate / (1 + exp(-gate)) * up in float64; gradients by autograd."""
    gate, up = gate.double(), up.double()
    return gate / (1 + (-gate).exp()) * up

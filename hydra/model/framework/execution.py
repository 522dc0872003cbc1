"""Execution: how a model computes, as opposed to what it is. Results differ in rounding only."""

import dataclasses

from hydra.attention.core import KERNELS
from hydra.attention.spec import check_known
from hydra.kernels.dispatch import KERNELS as OPERATOR_KERNELS

CHECKPOINTING = ("none", "selective", "full")
"""What a block keeps of its forward pass for the backward pass; see Execution.activation_checkpointing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """Decided once for a run and kept by it.

    Raises:
        ConfigError: there is no such kernel, implementation of operators, or way of checkpointing.
    """

    attention_kernel: str = "scaled_dot_product"
    """One of hydra.attention.core.KERNELS."""
    kernels: str = "torch"
    """What serves the operators of hydra.kernels: one of hydra.kernels.dispatch.KERNELS. Whether a device
    can have it is checked by build_model."""
    activation_checkpointing: str = "none"
    """What each block keeps for its backward pass. `none`: all that it needs. `selective`: the results of its matrix
    products; the rest is computed again. `full`: its input alone (Chen et al., arXiv 1604.06174, section 3)."""

    def __post_init__(self) -> None:
        check_known("attention_kernel", [self.attention_kernel], KERNELS)
        check_known("kernels", [self.kernels], OPERATOR_KERNELS)
        check_known("activation_checkpointing", [self.activation_checkpointing], CHECKPOINTING)

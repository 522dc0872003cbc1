"""Execution: how a model computes, as opposed to what it is. Results differ in rounding only."""

import dataclasses

from hydra.attention.core import KERNELS
from hydra.attention.spec import check_known


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """Decided once for a run and kept by it.

    Raises:
        ConfigError: there is no such kernel.
    """

    attention_kernel: str = "scaled_dot_product"
    """One of hydra.attention.core.KERNELS."""

    def __post_init__(self) -> None:
        check_known("attention_kernel", [self.attention_kernel], KERNELS)

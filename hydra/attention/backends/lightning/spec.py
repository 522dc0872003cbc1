"""Options of lightning attention (MiniMax-01, arXiv 2501.08313, section 2.2). No torch in this file."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hydra.attention.spec import AttentionSpec, check_int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LightningSpec(AttentionSpec):
    """n_heads heads of queries, keys and values each; how fast a head forgets depends on layer_index and n_layers."""

    gate_rank: int
    """Width between the two matrices of the output gate; 0 for one matrix of full rank, as in the released models."""

    @classmethod
    def default_options(cls, d_model: int, n_heads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """The gate of the released models."""
        return {"gate_rank": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("gate_rank", self.gate_rank, minimum=0)

    @property
    def layer_factor(self) -> float:
        """What every head's slope is multiplied with in this layer: 1 + 1e-5 in the first, about 1e-5 in the last."""
        return 1 - self.layer_index / (self.n_layers - 1 + 1e-5) + 1e-5

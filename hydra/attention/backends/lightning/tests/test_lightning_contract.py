"""The contract of attention backends, for lightning attention with a full and with a narrow gate."""

from typing import Any, ClassVar

import torch

from hydra.testing.attention_contract import AttentionContract
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401


class TestFullGate(AttentionContract):
    backend = "lightning"
    options: ClassVar[dict[str, Any]] = {"gate_rank": 0}
    may_be_zero = ("gate_rank",)
    uses_positions = False

    def expected_n_matrix_elements(self) -> int:
        return 5 * self.d_model**2

    def expected_n_parameters(self) -> int:
        return self.expected_n_matrix_elements() + self.d_model

    def expected_kv_elements(self) -> int:
        return 0

    def expected_state_elements(self) -> int:
        return self.n_heads * (self.d_model // self.n_heads) ** 2

    def expected_state_bytes(self, dtype: torch.dtype) -> int:
        return 4 * self.expected_state_elements()

    def expected_flops(self, n_tokens: int, n_pairs: int) -> int:
        # One chunk, all n * n pairs of it, whether they are causal or not.
        width = self.d_model // self.n_heads
        return (
            2 * self.expected_n_matrix_elements() * n_tokens
            + 4 * self.d_model * width * n_tokens
            + 4 * self.d_model * n_tokens**2
        )


class TestNarrowGate(TestFullGate):
    options: ClassVar[dict[str, Any]] = {"gate_rank": 3}

    def expected_n_matrix_elements(self) -> int:
        return 4 * self.d_model**2 + 2 * self.d_model * 3

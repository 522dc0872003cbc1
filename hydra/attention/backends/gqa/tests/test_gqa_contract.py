"""The contract of attention backends, for multi-head, grouped-query and multi-query attention."""

from typing import Any, ClassVar

from hydra.testing.attention_contract import AttentionContract
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401


class TestGroupedQuery(AttentionContract):
    backend = "gqa"
    options: ClassVar[dict[str, Any]] = {"n_kv_heads": 2, "rope_base": 500.0}

    @property
    def kv_width(self) -> int:
        return self.options["n_kv_heads"] * self.d_model // self.n_heads

    def expected_n_parameters(self) -> int:
        return 2 * self.d_model * self.d_model + 2 * self.d_model * self.kv_width

    def expected_kv_elements(self) -> int:
        return 2 * self.kv_width

    def expected_state_elements(self) -> int:
        return 0

    def expected_flops(self, n_tokens: int, n_pairs: int) -> int:
        return 2 * self.expected_n_parameters() * n_tokens + 4 * self.d_model * n_pairs


class TestMultiHead(TestGroupedQuery):
    options: ClassVar[dict[str, Any]] = {"n_kv_heads": 8}


class TestNormalised(TestGroupedQuery):
    options: ClassVar[dict[str, Any]] = {"n_kv_heads": 2, "qk_norm": True}


class TestMultiQuery(TestGroupedQuery):
    options: ClassVar[dict[str, Any]] = {"n_kv_heads": 1}


class TestWindowed(TestGroupedQuery):
    options: ClassVar[dict[str, Any]] = {"n_kv_heads": 2, "window": 4}

    may_be_zero = ("window",)

    def first_visible(self, t: int) -> int:
        return max(0, t - 3)

    def visible_pairs(self, n_tokens: int) -> int:
        return sum(min(t + 1, 4) for t in range(n_tokens))

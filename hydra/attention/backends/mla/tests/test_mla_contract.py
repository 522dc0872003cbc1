"""The contract of attention backends, for latent attention with and without a query latent, and without position."""

from typing import Any, ClassVar

from hydra.testing.attention_contract import AttentionContract
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401


class TestLatent(AttentionContract):
    """As in DeepSeek-V2-Lite; all widths differ, so that none can stand for another."""

    backend = "mla"
    options: ClassVar[dict[str, Any]] = {
        "kv_latent_width": 12,
        "q_latent_width": 0,
        "nope_width": 5,
        "rotary_width": 6,
        "value_width": 7,
        "rope_base": 500.0,
    }
    may_be_zero: ClassVar[tuple[str, ...]] = ("q_latent_width", "rotary_width")

    def n_weights(self) -> int:
        o, n_heads, d_model = self.options, self.n_heads, self.d_model
        query_width = n_heads * (o["nope_width"] + o["rotary_width"])
        queries = d_model * query_width
        if o["q_latent_width"]:
            queries = d_model * o["q_latent_width"] + o["q_latent_width"] * query_width
        compression = d_model * (o["kv_latent_width"] + o["rotary_width"])
        expansion = o["kv_latent_width"] * n_heads * (o["nope_width"] + o["value_width"])
        return queries + compression + expansion + n_heads * o["value_width"] * d_model

    def expected_n_parameters(self) -> int:
        return self.n_weights() + self.options["q_latent_width"] + self.options["kv_latent_width"]

    def expected_kv_elements(self) -> int:
        return self.options["kv_latent_width"] + self.options["rotary_width"]

    def expected_state_elements(self) -> int:
        return 0

    def expected_flops(self, n_tokens: int, n_pairs: int) -> int:
        o = self.options
        width = o["nope_width"] + o["rotary_width"] + o["value_width"]
        return 2 * self.n_weights() * n_tokens + 2 * self.n_heads * width * n_pairs


class TestLatentQueries(TestLatent):
    """As in DeepSeek-V3."""

    options: ClassVar[dict[str, Any]] = {**TestLatent.options, "q_latent_width": 10}


class TestWithoutPosition(TestLatent):
    options: ClassVar[dict[str, Any]] = {**TestLatent.options, "rotary_width": 0}
    uses_positions = False

"""The contract of attention backends, for CCA and CCGQA of several shapes."""

from typing import Any, ClassVar

from hydra.testing.attention_contract import AttentionContract
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401


class TestCCGQA(AttentionContract):
    backend = "ccgqa"
    options: ClassVar[dict[str, Any]] = {"n_query_heads": 4, "n_kv_heads": 2, "conv_kernel_0": 2, "conv_kernel_1": 2}

    @property
    def head_width(self) -> int:
        return self.d_model // self.n_heads

    @property
    def query_width(self) -> int:
        return self.options["n_query_heads"] * self.head_width

    @property
    def key_width(self) -> int:
        return self.options["n_kv_heads"] * self.head_width

    @property
    def n_channels(self) -> int:
        return self.query_width + self.key_width

    def convolution_weights(self) -> int:
        n_heads = self.options["n_query_heads"] + self.options["n_kv_heads"]
        depthwise = self.n_channels * self.options["conv_kernel_0"]
        return depthwise + n_heads * self.head_width**2 * self.options["conv_kernel_1"]

    def expected_n_parameters(self) -> int:
        linear = 2 * self.d_model * self.query_width + 2 * self.d_model * self.key_width
        return linear + self.convolution_weights() + 2 * self.n_channels + self.options["n_kv_heads"]

    def expected_kv_elements(self) -> int:
        return 2 * self.key_width

    def expected_state_elements(self) -> int:
        n_past = self.options["conv_kernel_0"] + self.options["conv_kernel_1"] - 2
        return self.n_channels * n_past + self.key_width // 2

    def expected_flops(self, n_tokens: int, n_pairs: int) -> int:
        linear = 2 * self.d_model * self.n_channels
        return 2 * (linear + self.convolution_weights()) * n_tokens + 4 * self.query_width * n_pairs

    def elementwise_flops(self, n_tokens: int) -> int:
        # The depthwise convolution: multiply-adds of whole tensors, which FlopCounterMode does not count. It also
        # runs for the k1 - 1 tokens before the first, which no formula counts.
        return 2 * self.n_channels * self.options["conv_kernel_0"] * n_tokens


class TestCCA(TestCCGQA):
    options: ClassVar[dict[str, Any]] = {"n_query_heads": 2, "n_kv_heads": 2, "conv_kernel_0": 3, "conv_kernel_1": 4}


class TestOneKeyHead(TestCCGQA):
    options: ClassVar[dict[str, Any]] = {
        "n_query_heads": 3,
        "n_kv_heads": 1,
        "conv_kernel_0": 4,
        "conv_kernel_1": 1,
        "rotary_fraction": 0.5,
    }


class TestNoLookBack(TestCCGQA):
    options: ClassVar[dict[str, Any]] = {"n_query_heads": 2, "n_kv_heads": 1, "conv_kernel_0": 1, "conv_kernel_1": 1}

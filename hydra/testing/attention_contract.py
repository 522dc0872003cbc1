"""What every attention backend must do. A backend's tests inherit AttentionContract and fill in the first part.

B batch, T tokens, D model width.
"""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hydra.attention import build_attention, check_options
from hydra.attention.base import AttentionBackend, AttentionCache
from hydra.errors import ConfigError
from hydra.testing.specs import build_random_layer, document_ids, random_activations
from hydra.testing.tolerances import assert_close


class AttentionContract:
    """Inherit, name the backend and its options, and say what it should cost."""

    backend: ClassVar[str]
    options: ClassVar[dict[str, Any]]
    d_model: ClassVar[int] = 32
    n_heads: ClassVar[int] = 8
    may_be_zero: ClassVar[tuple[str, ...]] = ()
    """Options for which 0 is a value and no mistake."""
    uses_positions: ClassVar[bool] = True
    """Whether the layer asks for positions; without, only the order of tokens matters."""

    def expected_n_parameters(self) -> int:
        """Parameters of the layer, from the paper's formula."""
        raise NotImplementedError

    def expected_kv_elements(self) -> int:
        """Elements by which a cache grows for each token of a sequence."""
        raise NotImplementedError

    def expected_state_elements(self) -> int:
        """Elements of a sequence's cache that do not depend on its length."""
        raise NotImplementedError

    def expected_state_bytes(self, dtype: torch.dtype) -> int:
        """What they take; a backend whose state is not in the parameters' dtype says so here."""
        return self.expected_state_elements() * dtype.itemsize

    def expected_flops(self, n_tokens: int, n_pairs: int) -> int:
        """Forward operations, 2 per multiply-add, when n_pairs pairs of query and key are scored."""
        raise NotImplementedError

    def elementwise_flops(self, n_tokens: int) -> int:
        """The part of expected_flops that is computed element-wise, which FlopCounterMode does not see."""
        return 0

    def first_visible(self, t: int) -> int:
        """The first token whose input reaches output t."""
        return 0

    def visible_pairs(self, n_tokens: int) -> int:
        """Pairs of query and key in one sequence."""
        return n_tokens * (n_tokens + 1) // 2

    def build(self, dtype: torch.dtype = torch.float64) -> AttentionBackend:
        """The layer under test, with random parameters."""
        return build_random_layer(self.backend, self.d_model, self.n_heads, dtype, **self.options)

    def activations(self, n_batch: int, n_tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Random input of the layer."""
        return random_activations(n_batch, n_tokens, self.d_model, dtype=dtype)

    # Causality, documents, batch.

    def test_later_tokens_change_nothing(self) -> None:
        """Outputs before a changed token are the same to the bit, and its own output changes."""
        layer, x_BTD = self.build(torch.float32), self.activations(2, 9, torch.float32)
        out_BTD = layer(x_BTD)
        for t in range(9):
            changed_BTD = x_BTD.clone()
            changed_BTD[:, t] += 1.0
            changed_out_BTD = layer(changed_BTD)
            assert torch.equal(changed_out_BTD[:, :t], out_BTD[:, :t]), t
            assert (changed_out_BTD[:, t] - out_BTD[:, t]).abs().max() > 1e-3, t

    def test_gradient_reaches_own_and_earlier_tokens_only(self) -> None:
        """The gradient of output t is exactly zero after t, nowhere zero on what it sees, and zero before that."""
        layer, x_BTD = self.build(), self.activations(1, 7).requires_grad_()
        out_BTD = layer(x_BTD)
        for t in range(7):
            (grad_BTD,) = torch.autograd.grad(out_BTD[:, t].square().sum(), x_BTD, retain_graph=True)
            assert grad_BTD[:, t + 1 :].abs().sum() == 0, t
            first = self.first_visible(t)
            assert (grad_BTD[:, first : t + 1].abs().sum(-1) > 0).all(), t
            assert grad_BTD[:, :first].abs().sum() == 0, t

    def test_documents_do_not_see_each_other(self) -> None:
        """Changing one document leaves the outputs of the others the same to the bit, and no gradient crosses."""
        layer, x_BTD, ids_BT = self.build(), self.activations(1, 12), document_ids(5, 1, 2, 4)
        out_BTD = layer(x_BTD, document_ids_BT=ids_BT)
        for document in range(4):
            is_inside_BT = ids_BT == document
            changed_BTD = x_BTD + is_inside_BT[:, :, None]
            changed_out_BTD = layer(changed_BTD, document_ids_BT=ids_BT)
            assert torch.equal(changed_out_BTD[~is_inside_BT], out_BTD[~is_inside_BT]), document
            input_BTD = x_BTD.clone().requires_grad_()
            layer(input_BTD, document_ids_BT=ids_BT)[is_inside_BT].square().sum().backward()
            assert input_BTD.grad is not None
            assert input_BTD.grad[~is_inside_BT].abs().sum() == 0, document

    def test_packed_documents_equal_separate_runs(self) -> None:
        """A row of documents gives what each document gives alone, whatever its neighbours and its ids are."""
        layer, x_BTD = self.build(), self.activations(2, 13)
        ids_BT = torch.cat([document_ids(5, 1, 7), document_ids(2, 3, 8)]) * 3 + 7
        out_BTD = layer(x_BTD, document_ids_BT=ids_BT)
        for row, lengths in enumerate([(5, 1, 7), (2, 3, 8)]):
            alone = [layer(part_TD[None])[0] for part_TD in x_BTD[row].split(lengths)]
            assert_close(out_BTD[row], torch.cat(alone), torch.float64, f"documents of row {row}")

    def test_rows_do_not_see_each_other(self) -> None:
        """A row gives the same, to the bit, beside any other row."""
        layer, x_BTD = self.build(torch.float32), self.activations(3, 7, torch.float32)
        changed_BTD = x_BTD.clone()
        changed_BTD[1] = 100.0
        out_BTD, changed_out_BTD = layer(x_BTD), layer(changed_BTD)
        assert torch.equal(out_BTD[[0, 2]], changed_out_BTD[[0, 2]])

    def test_positions_count_relatively(self) -> None:
        """Moving all positions changes nothing; stretching them does, where positions are used at all."""
        layer, x_BTD, positions_BT = self.build(), self.activations(2, 7), torch.arange(7)[None]
        out_BTD = layer(x_BTD)
        assert_close(layer(x_BTD, positions_BT=positions_BT + 1000), out_BTD, torch.float64, "outputs")
        stretched_BTD = layer(x_BTD, positions_BT=positions_BT * 3)
        if self.uses_positions:
            assert (stretched_BTD - out_BTD).abs().max() > 1e-6
        else:
            assert torch.equal(stretched_BTD, out_BTD)

    # Shapes and dtypes.

    @pytest.mark.parametrize("n_tokens", [1, 2, 3, 17, 33])
    def test_prefixes_agree(self, n_tokens: int) -> None:
        """Any length, also one shorter than a convolution, gives the beginning of a longer run."""
        layer, x_BTD = self.build(), self.activations(2, 33)
        out_BTD = layer(x_BTD[:, :n_tokens])
        assert_close(out_BTD, layer(x_BTD)[:, :n_tokens], torch.float64, "outputs")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_dtypes(self, dtype: torch.dtype) -> None:
        """Lower precision keeps its dtype and comes close to float64, with documents and without."""
        layer, x_BTD, ids_BT = self.build(dtype), self.activations(2, 17, dtype), document_ids(9, 8).expand(2, -1)
        exact = self.build()
        exact.load_state_dict(layer.state_dict())
        for ids in (None, ids_BT):
            out_BTD = layer(x_BTD, document_ids_BT=ids)
            assert out_BTD.dtype == dtype
            assert_close(out_BTD, exact(x_BTD.double(), document_ids_BT=ids), dtype, "outputs")

    def test_autocast(self) -> None:
        """float32 parameters under bfloat16 autocast work forward and backward, with documents."""
        layer, x_BTD, ids_BT = self.build(torch.float32), self.activations(1, 17, torch.float32), document_ids(9, 8)
        expected_BTD = layer(x_BTD, document_ids_BT=ids_BT)
        with torch.autocast("cpu", torch.bfloat16):
            out_BTD = layer(x_BTD, document_ids_BT=ids_BT)
        out_BTD.float().sum().backward()
        assert_close(out_BTD, expected_BTD, torch.bfloat16, "outputs")

    def test_meta_device(self) -> None:
        """Built without memory, moved and loaded, it computes the same: nothing is kept outside its state dict."""
        layer, x_BTD = self.build(), self.activations(2, 7)
        with torch.device("meta"):
            other = build_attention(self.backend, d_model=self.d_model, n_heads=self.n_heads, **self.options)
        other = other.double().to_empty(device="cpu")
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x_BTD), layer(x_BTD))
        assert not list(layer.buffers())

    # Cache.

    def run_split(
        self, layer: AttentionBackend, x_BTD: Tensor, split: tuple[int, ...], ids_BT: Tensor | None
    ) -> Tensor:
        """Feed x_BTD through a cache in pieces of these lengths."""
        cache = layer.new_cache(x_BTD.shape[0], x_BTD.shape[1])
        pieces, start = [], 0
        for length in split:
            stop = start + length
            ids = None if ids_BT is None else ids_BT[:, start:stop]
            pieces.append(layer(x_BTD[:, start:stop], cache=cache, document_ids_BT=ids))
            start = stop
        return torch.cat(pieces, dim=1)

    @pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
    @pytest.mark.parametrize(
        "split", [(11,), (1,) * 11, (7, 1, 1, 1, 1), (1, 10), (2, 9), (3, 5, 3), (6, 1, 2, 2)], ids=str
    )
    @torch.no_grad()
    def test_any_split_of_prefill_and_decode(self, split: tuple[int, ...], packed: bool) -> None:
        """Prefill, decode and chunks of any size through a cache equal one pass without it."""
        layer, x_BTD = self.build(), self.activations(2, 11)
        ids_BT = torch.cat([document_ids(4, 1, 6), document_ids(7, 4)]) if packed else None
        expected_BTD = layer(x_BTD, document_ids_BT=ids_BT)
        assert_close(self.run_split(layer, x_BTD, split, ids_BT), expected_BTD, torch.float64, "outputs")

    @torch.no_grad()
    def test_unused_cache_memory_is_never_read(self, nan_poisoned_memory: None) -> None:
        """A cache much larger than the sequence, full of NaN, changes nothing."""
        layer, x_BTD = self.build(), self.activations(2, 6)
        cache = layer.new_cache(2, 50)
        out_BTD = torch.cat([layer(x_BTD[:, :4], cache=cache), layer(x_BTD[:, 4:], cache=cache)], dim=1)
        assert_close(out_BTD, layer(x_BTD), torch.float64, "outputs")

    def test_cache_refuses_what_it_cannot_hold(self) -> None:
        """Too many tokens, another batch size, and documents for some tokens only are errors that say so."""
        layer, x_BTD, ids_BT = self.build(), self.activations(2, 4), document_ids(4).expand(2, -1)
        cache = layer.new_cache(2, 5)
        with pytest.raises(ConfigError, match="batch size must be the cache's 2, but got 1"):
            layer(x_BTD[:1], cache=cache)
        layer(x_BTD, cache=cache)
        with pytest.raises(ConfigError, match=r"max_tokens=5 tokens, but got 4 \+ 4"):
            layer(x_BTD, cache=cache)
        with pytest.raises(ConfigError, match="document_ids_BT must come with every call"):
            layer(x_BTD[:, :1], cache=cache, document_ids_BT=ids_BT[:, :1])
        layer(x_BTD[:, :1], cache=cache)
        with pytest.raises(ConfigError, match="max_tokens=5"):
            layer(x_BTD[:, :1], cache=cache)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @torch.no_grad()
    def test_cache_bytes(self, dtype: torch.dtype) -> None:
        """What the layer claims, what the formula says and what the tensors of a used cache take are one number."""
        layer = self.build(dtype)
        cache = layer.new_cache(3, 10)
        for _ in range(2):
            layer(self.activations(3, 5, dtype), cache=cache)
        state = cache.state_tensors()
        tokens = cache.token_tensors()
        assert self.storage_bytes(*tokens) == 3 * 10 * layer.kv_bytes_per_token
        assert self.storage_bytes(*state) == 3 * layer.constant_state_bytes
        assert layer.kv_bytes_per_token == self.expected_kv_elements() * dtype.itemsize
        assert layer.constant_state_bytes == self.expected_state_bytes(dtype)
        assert len(self.cache_tensors(cache)) == len(tokens) + len(state), "every tensor of a cache must be counted"

    @staticmethod
    def cache_tensors(cache: AttentionCache) -> list[Tensor]:
        """Every tensor that is a field of the cache."""
        return [value for value in vars(cache).values() if isinstance(value, Tensor)]

    @staticmethod
    def storage_bytes(*tensors: Tensor) -> int:
        """Memory that the tensors keep alive; a view counts as all of what it looks into."""
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    # Costs and options.

    def test_parameter_count(self) -> None:
        """The paper's formula, exactly."""
        assert sum(parameter.numel() for parameter in self.build().parameters()) == self.expected_n_parameters()

    def test_every_parameter_gets_a_gradient(self) -> None:
        """No parameter is idle."""
        layer, x_BTD = self.build(), self.activations(2, 9)
        layer(x_BTD).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 1e-9, name

    @pytest.mark.parametrize("n_tokens", [1, 2, 19])
    def test_flops(self, n_tokens: int) -> None:
        """The layer counts causal pairs as the formula does, and the operations that run agree.

        FlopCounterMode counts matrix products only, and attention with all n * n pairs.
        """
        layer, x_BTD = self.build(torch.float32), self.activations(1, n_tokens, torch.float32)
        assert layer.flops(n_tokens) == self.expected_flops(n_tokens, self.visible_pairs(n_tokens))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            layer(x_BTD)
        all_pairs = self.expected_flops(n_tokens, n_tokens * n_tokens)
        assert counter.get_total_flops() == all_pairs - self.elementwise_flops(n_tokens)

    def test_options_are_checked(self) -> None:
        """Unknown options name the closest known one; values of the wrong type name the field."""
        check_options(self.backend, self.d_model, self.n_heads, self.options)
        name = next(iter(self.options))
        with pytest.raises(ConfigError, match=f"did you mean '{name}'"):
            check_options(self.backend, self.d_model, self.n_heads, {name[:-1]: 1})
        for option, value in self.options.items():
            zero = [] if option in self.may_be_zero else [0]
            for wrong in (1 if isinstance(value, bool) else True, "2", None, [value], -1, *zero, float("nan")):
                with pytest.raises(ConfigError, match=option):
                    check_options(self.backend, self.d_model, self.n_heads, {**self.options, option: wrong})
        with pytest.raises(ConfigError, match=r"n_heads must divide d_model, but got n_heads=7 and d_model=32"):
            check_options(self.backend, 32, 7, {})

    def test_options_reach_the_spec(self) -> None:
        """What was asked for is what the layer holds."""
        spec = self.build().spec
        assert (spec.d_model, spec.n_heads) == (self.d_model, self.n_heads)
        assert {name: getattr(spec, name) for name in self.options} == self.options

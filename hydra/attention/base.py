"""AttentionBackend: what every attention layer offers, and the protocol of its cache.

B batch, T new tokens, S tokens so far, D model width, K key/value heads, H head width.
"""

import dataclasses
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor, nn

from hydra.attention.masks import AttentionContext, TokenHistory, build_context
from hydra.attention.spec import AttentionSpec
from hydra.layers.norms import RMSNorm

__all__ = ["AttentionBackend", "AttentionCache", "AttentionSpec", "KeyValueCache"]


@dataclasses.dataclass
class AttentionCache:
    """What a layer keeps of the tokens so far, in memory taken once. Backends add their tensors as fields.

    The history counts the tokens; it is extended by whoever builds the AttentionContext, once per forward pass. Every
    tensor has the rows of the batch first, and is written in place.
    """

    history: TokenHistory

    def token_tensors(self) -> list[Tensor]:
        """Tensors with a place for each token."""
        return []

    def state_tensors(self) -> list[Tensor]:
        """Tensors whose size does not depend on the number of tokens."""
        return []

    def clear(self) -> None:
        """Zeros everywhere: with static shapes also what is masked enters a product, and may not be NaN there."""
        for value in self._tensors().values():
            value.zero_()

    def row(self, index: int) -> Self:
        """The cache of one row, empty, in the same memory."""
        history = TokenHistory(1, self.history.max_tokens)
        rows = {name: value[index : index + 1] for name, value in self._tensors().items()}
        return dataclasses.replace(self, history=history, **rows)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclasses.dataclass
class KeyValueCache(AttentionCache):
    """Keys and values of the tokens so far."""

    k_BKSH: Tensor
    v_BKSH: Tensor

    def append(self, k_BKTH: Tensor, v_BKTH: Tensor, n_past: int | Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values of new tokens behind the first n_past, return those of all tokens so far."""
        k_BKSH = write_tokens(self.k_BKSH, k_BKTH, n_past, token_axis=2)
        return k_BKSH, write_tokens(self.v_BKSH, v_BKTH, n_past, token_axis=2)

    def token_tensors(self) -> list[Tensor]:
        """Tensors with a place for each token."""
        return [self.k_BKSH, self.v_BKSH]


def write_tokens(memory: Tensor, new: Tensor, n_past: int | Tensor, *, token_axis: int) -> Tensor:
    """Write what belongs to new tokens behind the first n_past of a cache's tensor, return the part of all so far.

    With n_past (B,), of one new token in each row, shapes are static: returned is the whole memory, and it is the mask
    of the context that says what of it is tokens.
    """
    if isinstance(n_past, Tensor):
        rows_B = torch.arange(n_past.shape[0], device=n_past.device)
        memory.movedim(token_axis, 1)[rows_B, n_past] = new.squeeze(token_axis)
        return memory
    stop = n_past + new.shape[token_axis]
    memory.narrow(token_axis, n_past, stop - n_past).copy_(new)
    return memory.narrow(token_axis, 0, stop)


class AttentionBackend(nn.Module, ABC):
    """One attention layer, causal, from (B, T, D) to (B, T, D).

    A subclass takes its spec, and defines prepare, attend, new_cache and the three counts.
    """

    kernels: str = "torch"
    """What serves the operators that a layer takes from hydra.kernels: one of hydra.kernels.dispatch.KERNELS."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec

    def use_kernels(self, kernels: str) -> None:
        """Let `kernels` serve this layer and the norms inside it."""
        self.kernels = kernels
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.kernels = kernels

    def forward(
        self,
        x_BTD: Tensor,
        context: AttentionContext | None = None,
        *,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """Attend causally, within documents.

        Args:
            x_BTD: activations, normalised, any floating dtype.
            context: prepared by a model outside of compiled code (then positions and documents are in it); otherwise
                made here.
            positions_BT: integer positions, default counts on from the cache.
            document_ids_BT: integers; tokens of one document stand together, and see that document only.
            cache: from new_cache; the tokens go on where it ends, and are added to it. For inference: a backward pass
                over more than one call on a cache is refused by autograd.
        Returns:
            (B, T, D) in the dtype of x_BTD.
        Raises:
            ConfigError: the cache is too small, or its document ids are incomplete.
        """
        if context is None:
            history = None if cache is None else cache.history
            context = self.prepare(build_context(x_BTD, positions_BT, document_ids_BT, history))
        else:
            assert positions_BT is None, "positions belong into the context"
            assert document_ids_BT is None, "documents belong into the context"
        return self.attend(x_BTD, context, cache)

    @abstractmethod
    def prepare(self, context: AttentionContext) -> AttentionContext:
        """The context of layers like this one: `context.specialise` with what this layer needs to know."""

    @abstractmethod
    def attend(self, x_BTD: Tensor, context: AttentionContext, cache: AttentionCache | None) -> Tensor:
        """What forward does, with positions and visibility worked out."""

    @abstractmethod
    def new_cache(self, batch_size: int, max_tokens: int, *, history: TokenHistory | None = None) -> AttentionCache:
        """An empty cache for max_tokens tokens in each of batch_size rows, on the device and in the dtype of the layer.

        Args:
            history: the count that the layers of a model share; default one of its own.
        """

    @property
    @abstractmethod
    def kv_bytes_per_token(self) -> int:
        """Bytes that the cache grows by for each token of a sequence, in the dtype of the parameters."""

    @property
    @abstractmethod
    def constant_state_bytes(self) -> int:
        """Bytes of the cache of a sequence that do not depend on its length, in the dtype of the parameters."""

    @abstractmethod
    def flops(self, n_tokens: int) -> int:
        """Forward floating-point operations of one sequence of n_tokens tokens, 2 per multiply-add.

        Projections, convolutions and causal score pairs n(n+1)/2; no element-wise work, softmax or biases.
        """

    @property
    def score_width(self) -> int:
        """Channels of a query that a score is the product of; 0 without softmax attention. Kernels have limits."""
        return self.spec.head_width

    def empty_kv(self, batch_size: int, n_kv_heads: int, max_tokens: int) -> tuple[Tensor, Tensor]:
        """Memory for keys and values (B, K, S, H), not initialised: only what was written is ever read."""
        parameter = next(self.parameters())
        shape = (batch_size, n_kv_heads, max_tokens, self.spec.head_width)
        return parameter.new_empty(shape), parameter.new_empty(shape)


def count_visible_pairs(n_tokens: int, window: int = 0) -> int:
    """Pairs of a query and a key it may see, in one sequence: n(n+1)/2, less what lies before a window (0: none)."""
    n_hidden = max(0, n_tokens - window) if window else 0
    return (n_tokens * (n_tokens + 1) - n_hidden * (n_hidden + 1)) // 2

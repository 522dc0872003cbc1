"""Which key each query may see, as data that all layers of one forward pass share.

B batch, T new tokens (queries), S all tokens so far (keys): those of the cache, then the T new ones.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra.errors import ConfigError
from hydra.layers.rotary import compute_rotary

NEEDS_MASK = ("scaled_dot_product", "blocked")
"""Kernels of hydra.attention.core that read visibility as a matrix and not as an interval of keys."""
FLASH_STARTS = 64
"""The number of sequences that flash-attn is told is a multiple of this: each other number is compiled anew."""


def causal_mask(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Bottom-right aligned causal mask (T, S), True = attend: the queries are the last n_queries of n_keys tokens."""
    assert n_queries <= n_keys, (n_queries, n_keys)
    return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_queries)


def first_of_document(document_ids_BS: Tensor, n_queries: int) -> Tensor:
    """Where the documents of the last n_queries tokens begin, (B, n_queries), int64: tokens of one stand together."""
    places_S = torch.arange(document_ids_BS.shape[1], device=document_ids_BS.device)
    is_same_BS = F.pad(document_ids_BS[:, 1:] == document_ids_BS[:, :-1], (1, 0))
    return places_S.expand_as(document_ids_BS).masked_fill(is_same_BS, 0).cummax(dim=1).values[:, -n_queries:]


def interval_mask(first_visible_BT: Tensor, n_past: int) -> Tensor:
    """Mask (B, T, S), True = attend: query t sees the keys from first_visible_BT to its own, n_past + t."""
    n_queries = first_visible_BT.shape[1]
    n_keys = n_past + n_queries
    keys_S = torch.arange(n_keys, device=first_visible_BT.device)
    return causal_mask(n_queries, n_keys, first_visible_BT.device) & (keys_S >= first_visible_BT[:, :, None])


def to_additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where the boolean mask is True, -inf elsewhere: what softmax attention adds to its scores."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


@dataclasses.dataclass
class TokenHistory:
    """Which tokens a cache already holds. One history is shared by the caches of all layers of a model."""

    batch_size: int
    max_tokens: int
    n_tokens: int = 0
    document_ids_BS: Tensor | None = None

    def extend(self, batch_size: int, n_tokens: int, document_ids_BT: Tensor | None) -> None:
        """Count n_tokens more tokens and remember their documents.

        Raises:
            ConfigError: the cache is too small for them, was made for another batch size, or document ids come with
                some of its tokens and not with others.
        """
        if batch_size != self.batch_size:
            raise ConfigError(
                f"batch size must be the cache's {self.batch_size}, but got {batch_size} rows; make another cache"
            )
        if self.n_tokens + n_tokens > self.max_tokens:
            raise ConfigError(
                f"a cache must hold at most max_tokens={self.max_tokens} tokens, but got {self.n_tokens} + {n_tokens}; "
                f"make it with new_cache(batch_size, max_tokens) for all tokens of the sequence"
            )
        if self.n_tokens > 0 and (document_ids_BT is None) != (self.document_ids_BS is None):
            raise ConfigError(
                "document_ids_BT must come with every call on a cache or with none, but got "
                f"{'none' if document_ids_BT is None else 'some'} after {self.n_tokens} tokens; pass them every time"
            )
        self.n_tokens += n_tokens
        if self.document_ids_BS is None or document_ids_BT is None:
            self.document_ids_BS = document_ids_BT
        else:
            self.document_ids_BS = torch.cat([self.document_ids_BS, document_ids_BT], dim=1)


Visibility = tuple[Tensor | None, Tensor | None, Any]
"""first_visible_BT, mask_B1TS and kernel_data of an AttentionContext, each None where nobody reads it."""


@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """What the layers of one forward pass know about its tokens.

    A forward pass builds one (`build_context`), and each layer derives its own from it (`specialise`), outside of
    compiled code: layers of one kind share what was worked out, and what compiled code reads does not depend on which
    other layers there are.
    """

    n_past: int | Tensor
    """Tokens in the cache before this pass; S = n_past + T. A tensor (B,) in a step of a Decoder, of shapes that
    do not depend on it: there S is what the cache has room for."""
    positions_BT: Tensor
    """Integer positions for the rotary embedding, (B, T) or (1, T)."""
    document_ids_BS: Tensor | None = None
    """Document of every token so far; None when a row is one document. Tokens of one document stand together."""
    kernel: str = "scaled_dot_product"
    """Which of hydra.attention.core.KERNELS computes softmax attention."""
    first_visible_BT: Tensor | None = None
    """The first key that each query sees, int64, (B or 1, T), never falling from one query to the next. It sees those
    from there to its own. None: from the first on."""
    mask_B1TS: Tensor | None = None
    """The same as what is added to scores, 0 or -inf; for kernels that read one (NEEDS_MASK). None when causality is
    all there is."""
    kernel_data: Any = None
    """The same in the kernel's own form: FlexAttention's BlockMask, flash-attn's FlashSequences."""
    rotary: tuple[Tensor, Tensor] | None = None
    """cos_BT1R and sin_BT1R of these tokens, see compute_rotary."""
    rotary_tables: dict[tuple[int, float], tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict, repr=False)
    """For `specialise`: cosines and sines by rotated width and base, as layers have asked for them."""
    shared: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)
    """For `specialise`: contexts and visibility, as layers have asked for them."""

    def specialise(
        self, dtype: torch.dtype, *, rotary: tuple[int, float] | None = None, window: int | None = None
    ) -> "AttentionContext":
        """The context of layers that rotate and see alike, worked out once.

        Args:
            dtype: of the layers' activations.
            rotary: rotated channels of a head and base of the rotary embedding; None for layers without one.
            window: how many tokens a query sees at most, its own included; None for all before it.
        """
        key = ("context", dtype, rotary, window)
        if key not in self.shared:
            if rotary is not None and rotary not in self.rotary_tables:
                self.rotary_tables[rotary] = compute_rotary(self.positions_BT, *rotary, dtype)
            visibility = ("visibility", dtype, window)
            if visibility not in self.shared:
                self.shared[visibility] = self._visibility(window, dtype)
            first_BT, mask_B1TS, kernel_data = self.shared[visibility]
            self.shared[key] = AttentionContext(
                self.n_past,
                self.positions_BT,
                self.document_ids_BS,
                self.kernel,
                first_BT,
                mask_B1TS,
                kernel_data,
                None if rotary is None else self.rotary_tables[rotary],
            )
        return self.shared[key]

    def _visibility(self, window: int | None, dtype: torch.dtype) -> Visibility:
        if isinstance(self.n_past, Tensor):
            return None, self._narrowed_mask(self.n_past, window), None
        first_BT, n_queries = None, self.positions_BT.shape[1]
        if self.document_ids_BS is not None:
            first_BT = first_of_document(self.document_ids_BS, n_queries)
        if window is not None and window < self.n_past + n_queries:
            own_T = torch.arange(self.n_past, self.n_past + n_queries, device=self.positions_BT.device)
            oldest_1T = (own_T - (window - 1)).clamp(min=0)[None]
            first_BT = oldest_1T if first_BT is None else torch.maximum(first_BT, oldest_1T)
        mask_B1TS, kernel_data = None, None
        if first_BT is not None and self.kernel in NEEDS_MASK:
            mask_B1TS = to_additive(interval_mask(first_BT, self.n_past), dtype)[:, None]
        if self.kernel == "flex":
            kernel_data = build_block_mask(first_BT, self.n_past, n_queries, self.positions_BT.device)
        if self.kernel == "flash":
            kernel_data = build_flash_sequences(self.document_ids_BS, self.n_past, window)
        return first_BT, mask_B1TS, kernel_data

    def _narrowed_mask(self, n_past_B: Tensor, window: int | None) -> Tensor:
        """The mask of a step of a Decoder, without what lies before the window."""
        assert self.mask_B1TS is not None, "a decode step has a mask"
        if window is None:
            return self.mask_B1TS
        keys_S = torch.arange(self.mask_B1TS.shape[-1], device=n_past_B.device)
        return self.mask_B1TS.masked_fill((keys_S <= n_past_B[:, None] - window)[:, None, None], -torch.inf)

    def recent_document_ids(self, n_before: int) -> Tensor | None:
        """Document ids of the new tokens and of the n_before tokens before them, (B, n_before + T).

        Where there are fewer tokens before them, the places are filled with the first id: whoever reads them must hold
        zeros there.
        """
        if self.document_ids_BS is None:
            return None
        assert isinstance(self.n_past, int), "a decode step has no documents"
        missing = max(0, n_before - self.n_past)
        ids_BP = self.document_ids_BS[:, max(0, self.n_past - n_before) :]
        return torch.cat([ids_BP[:, :1].expand(-1, missing), ids_BP], dim=1)


def build_block_mask(first_visible_BT: Tensor | None, n_past: int, n_queries: int, device: torch.device) -> Any:
    """FlexAttention's form of the intervals of keys that queries see."""
    from torch.nn.attention.flex_attention import create_block_mask  # imports torch's compiler

    def is_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_causal = key <= query + n_past
        if first_visible_BT is None:
            return is_causal
        return is_causal & (key >= first_visible_BT[row if first_visible_BT.shape[0] > 1 else 0, query])

    n_rows = None if first_visible_BT is None or first_visible_BT.shape[0] == 1 else first_visible_BT.shape[0]
    return create_block_mask(is_visible, n_rows, None, n_queries, n_past + n_queries, device=device)


@dataclasses.dataclass(frozen=True)
class FlashSequences:
    """What flash-attn is told of the rows of a batch."""

    window: tuple[int, int]
    """Keys before and after its own that a query sees; -1 for all."""
    starts: Tensor | None
    """Where each document begins in the rows laid end to end, and where the last ends, int32; None when rows are
    one document each. The last number is repeated, so that few lengths occur: sequences of no token cost little."""


def build_flash_sequences(document_ids_BS: Tensor | None, n_past: int, window: int | None) -> FlashSequences:
    """flash-attn's form of documents and window.

    Raises:
        ConfigError: documents go on from a cache.
    """
    sides = (-1, -1) if window is None else (window - 1, 0)
    if document_ids_BS is None:
        return FlashSequences(sides, None)
    if n_past > 0:
        raise ConfigError(
            "flash-attn must get packed rows whole, but got documents that go on from a cache; decode one document in "
            "each row, or use attention_kernel scaled_dot_product"
        )
    is_first_BS = F.pad(document_ids_BS[:, 1:] != document_ids_BS[:, :-1], (1, 0), value=True)
    lengths = torch.bincount(is_first_BS.flatten().cumsum(0) - 1)
    starts = F.pad(lengths.cumsum(0), (1, 0))
    n_padded = -(-len(starts) // FLASH_STARTS) * FLASH_STARTS
    return FlashSequences(sides, F.pad(starts, (0, n_padded - len(starts)), value=is_first_BS.numel()).int())


def build_context(
    x_BTD: Tensor,
    positions_BT: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    history: TokenHistory | None = None,
    kernel: str = "scaled_dot_product",
) -> AttentionContext:
    """What is known of the tokens x_BTD before any layer is; counts them in the history if there is one.

    Args:
        x_BTD: activations; only shape and device are used.
        positions_BT: default n_past, n_past + 1, ...: they go on over documents, since rotary scores depend on
            differences only.
        document_ids_BT: integers; tokens see only their own document. Tokens of one document must stand together.
        history: of the cache, if there is one.
        kernel: one of hydra.attention.core.KERNELS.
    Raises:
        ConfigError: from TokenHistory.extend.
    """
    batch_size, n_tokens = x_BTD.shape[0], x_BTD.shape[1]
    n_past = 0
    document_ids_BS = document_ids_BT
    if history is not None:
        n_past = history.n_tokens
        history.extend(batch_size, n_tokens, document_ids_BT)
        document_ids_BS = history.document_ids_BS
    if positions_BT is None:
        positions_BT = torch.arange(n_past, n_past + n_tokens, device=x_BTD.device)[None]
    return AttentionContext(n_past, positions_BT, document_ids_BS, kernel)

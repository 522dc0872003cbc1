"""Which key each query may see, as data that all layers of one forward pass share.

B batch, T new tokens (queries), S all tokens so far (keys): those of the cache, then the T new ones.
"""

import dataclasses

import torch
from torch import Tensor

from hydra.errors import ConfigError
from hydra.layers.rotary import compute_rotary


def causal_mask(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Bottom-right aligned causal mask (T, S), True = attend: the queries are the last n_queries of n_keys tokens."""
    assert n_queries <= n_keys, (n_queries, n_keys)
    return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_queries)


def document_mask(document_ids_BS: Tensor, n_queries: int) -> Tensor:
    """Mask (B, T, S), True where query and key belong to the same document; says nothing about order."""
    return document_ids_BS[:, -n_queries:, None] == document_ids_BS[:, None, :]


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


@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """What all layers of one forward pass know about its tokens."""

    n_past: int | Tensor
    """Tokens in the cache before this pass; S = n_past + T. A tensor (B,) in a step of a Decoder, of shapes that
    do not depend on it: there S is what the cache has room for."""
    positions_BT: Tensor
    """Integer positions for the rotary embedding, (B, T) or (1, T)."""
    document_ids_BS: Tensor | None
    """Document of every token so far; None when a row is one document. Tokens of one document stand together."""
    mask_B1TS: Tensor | None
    """Additive mask, causal and within documents; None when causality is all there is."""
    kernel: str = "scaled_dot_product"
    """Which of hydra.attention.core.KERNELS computes softmax attention."""
    rotary_tables: dict[tuple[int, float], tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)
    """Cosines and sines by rotated width and base, as layers have asked for them."""

    def rotary(self, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos_BT1R and sin_BT1R for these tokens, worked out once for all layers; see compute_rotary."""
        if (width, base) not in self.rotary_tables:
            self.rotary_tables[width, base] = compute_rotary(self.positions_BT, width, base, dtype)
        return self.rotary_tables[width, base]

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


def build_context(
    x_BTD: Tensor,
    positions_BT: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    history: TokenHistory | None = None,
    kernel: str = "scaled_dot_product",
) -> AttentionContext:
    """Work out once, for all layers, what the tokens x_BTD may see; counts them in the history if there is one.

    Args:
        x_BTD: activations; only shape, dtype (that of the mask) and device are used.
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
    mask_B1TS = None
    if document_ids_BS is not None:
        allowed_BTS = document_mask(document_ids_BS, n_tokens) & causal_mask(n_tokens, n_past + n_tokens, x_BTD.device)
        mask_B1TS = to_additive(allowed_BTS, x_BTD.dtype)[:, None]
    return AttentionContext(n_past, positions_BT, document_ids_BS, mask_B1TS, kernel)

"""Lightning attention: linear attention with a decay for each head, as matrix products over chunks of tokens.

out_t = q_t state_t with state_t = exp(-slope) state_(t-1) + k_t^T v_t: no softmax, no denominator, no 1/sqrt(H)
(MiniMax-01, arXiv 2501.08313, section 2.2; the chunks are those of Lightning Attention-2, arXiv 2401.04658). Within a
chunk the products of queries and keys are weighted by the decay; what came before it arrives through the state.

B batch, T tokens, P = 1 + T, N heads, H head width; C tokens of a chunk, J chunks, X = B J N.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 256
"""Tokens of a chunk: longer ones have more pairs of tokens to weigh, shorter ones more states to pass on."""
MAX_PAIRS = 2**22
"""Pairs of tokens, over all heads, that are weighed at a time: 8 MiB in bfloat16, which a level-3 cache takes."""
MAX_PIECES = 16
"""Longer sequences get larger pieces instead: each is code of its own to a compiler."""
NEGLIGIBLE_NATS = 60.0
"""Weights below exp(-60) = 9e-27 are zero in chunks."""


def lightning_attention(
    q_BTNH: Tensor,
    k_BTNH: Tensor,
    v_BTNH: Tensor,
    slopes_N: Tensor,
    document_ids_BP: Tensor | None = None,
    state_BNHH: Tensor | None = None,
    chunk: int = CHUNK,
    kernels: str = "torch",
) -> tuple[Tensor, Tensor]:
    """out_t = sum over s <= t of exp(-slope (t - s)) (q_t . k_s) v_s, within documents, and going on from a state.

    Products are computed in the dtype of q; decays, and the states from chunk to chunk, in float32 (float64 for float64
    input). It can be differentiated once, by q, k, v and the state, through both results.

    Args:
        q_BTNH, k_BTNH, v_BTNH: in one dtype, at least one token. Any strides.
        slopes_N: how fast each head forgets, in nats per token, not negative, float32 or float64.
        document_ids_BP: integers: of the token before the first (whose document the state is of), then of the T tokens.
            Tokens of one document stand together. None: all are one document, and the state is of that one.
        state_BNHH: sum of decayed k^T v (key channels, then value channels) behind the token before the first, in
            float32 (float64 for float64 input). None: zeros.
        chunk: tokens of a chunk; results depend on it by rounding only. Triton's kernels have their own.
        kernels: one of hydra.kernels.dispatch.KERNELS.
    Returns:
        out_BTNH in the dtype of q, and the state behind the last token, in the dtype that a given one must have.
    Raises:
        ConfigError: kernels=triton cannot take this dtype or head width.
    """
    dtype = torch.promote_types(q_BTNH.dtype, torch.float32)
    assert q_BTNH.dtype == k_BTNH.dtype == v_BTNH.dtype, (q_BTNH.dtype, k_BTNH.dtype, v_BTNH.dtype)
    if state_BNHH is None:
        n_batch, _, n_heads, width = q_BTNH.shape
        state_BNHH = q_BTNH.new_zeros(n_batch, n_heads, width, width, dtype=dtype)
    assert state_BNHH.dtype == dtype, state_BNHH.dtype
    if kernels == "triton":
        from hydra.kernels._triton import lightning_attention as triton_kernels

        return triton_kernels.lightning_attention(q_BTNH, k_BTNH, v_BTNH, slopes_N, document_ids_BP, state_BNHH)
    return _LightningAttention.apply(q_BTNH, k_BTNH, v_BTNH, slopes_N.to(dtype), document_ids_BP, state_BNHH, chunk)


def lightning_attention_step(
    q_BNH: Tensor, k_BNH: Tensor, v_BNH: Tensor, slopes_N: Tensor, state_BNHH: Tensor
) -> tuple[Tensor, Tensor]:
    """lightning_attention of one token in each row, element-wise, in the dtype of the state.

    Returns:
        out_BNH in the dtype of q, and the new state; nothing is changed in place.
    """
    dtype = state_BNHH.dtype
    decay_N11 = torch.exp(-slopes_N.to(dtype))[:, None, None]
    added_BNHH = k_BNH.to(dtype)[..., :, None] * v_BNH.to(dtype)[..., None, :]
    state_BNHH = decay_N11 * state_BNHH + added_BNHH
    out_BNH = (q_BNH.to(dtype)[..., :, None] * state_BNHH).sum(2)
    return out_BNH.to(q_BNH.dtype), state_BNHH


def count_lightning_flops(n_tokens: int, n_heads: int, width: int, chunk: int = CHUNK) -> int:
    """Forward operations of lightning_attention on one sequence, 2 per multiply-add: 4 N H (H T + sum of n^2).

    The sum runs over chunks of n tokens, the last of which may be shorter: a chunk's pairs are all computed, also those
    of a query and a later key. The state meets every token twice, also where it is zero or nobody reads it.
    """
    n_chunks, n_rest = divmod(n_tokens, chunk)
    return 4 * n_heads * width * (width * n_tokens + n_chunks * chunk**2 + n_rest**2)


@dataclasses.dataclass(frozen=True)
class _Decays:
    """What remains of a token or a state after a while; zero where a document ends in between."""

    within: Tensor
    """Of each key of a chunk at each of its queries, (N, C, C), in the dtype of the products; 0 for later keys."""
    is_other: Tensor | None
    """Where query and key are of different documents, (B, J, 1, C, C); `within` does not know."""
    arriving: Tensor
    """Of the state before a chunk at each of its queries, (B or 1, J or 1, N, C, 1), in the dtype of the products."""
    leaving: Tensor
    """Of each key behind its chunk, in the same shape and dtype."""
    through: Tensor
    """Of the state before a chunk behind it, (B or 1, J or 1, N, 1, 1), in the dtype of states."""

    def of_documents(self, document_ids_BP: Tensor | None) -> "_Decays":
        """For whole chunks of tokens of these documents, and of that of the token before them."""
        if document_ids_BP is None:
            return self
        ids_BJC = document_ids_BP[:, 1:].unflatten(1, (-1, self.within.shape[1]))
        before_BJ1 = document_ids_BP[:, :-1].unflatten(1, (-1, self.within.shape[1]))[:, :, :1]
        last_BJ1 = ids_BJC[:, :, -1:]
        return _Decays(
            self.within,
            (ids_BJC[:, :, :, None] != ids_BJC[:, :, None, :])[:, :, None],
            self.arriving * (ids_BJC == before_BJ1)[:, :, None, :, None],
            self.leaving * (ids_BJC == last_BJ1)[:, :, None, :, None],
            self.through * (before_BJ1 == last_BJ1)[:, :, None, :, None],
        )

    def weigh(self, scores_XCC: Tensor) -> Tensor:
        """Decayed in place, (X, C, C)."""
        shape = (-1, self.within.shape[0]) if self.is_other is None else (*self.is_other.shape[:2], -1)
        scores = scores_XCC.view(*shape, *scores_XCC.shape[1:]).mul_(self.within)
        if self.is_other is not None:
            scores.masked_fill_(self.is_other, 0)
        return scores_XCC


def _remain(lost_nats: Tensor) -> Tensor:
    """exp(-lost_nats), and 0 instead of what is so small that its products take a CPU a hundred times as long."""
    return torch.exp(-lost_nats).masked_fill(lost_nats > NEGLIGIBLE_NATS, 0)


def _compute_decays(slopes_N: Tensor, lengths: set[int], dtype: torch.dtype) -> dict[int, _Decays]:
    """Within one document, for chunks of each of these lengths."""
    tables = {}
    for length in lengths:
        steps_C = torch.arange(length, device=slopes_N.device)
        distances_CC = steps_C[:, None] - steps_C
        within_NCC = _remain(slopes_N[:, None, None] * distances_CC).masked_fill(distances_CC < 0, 0)
        by_step = [slopes_N[:, None] * (steps_C + 1), slopes_N[:, None] * (length - 1 - steps_C)]
        arriving, leaving = (_remain(lost_NC)[None, None, :, :, None].to(dtype) for lost_NC in by_step)
        through = _remain(slopes_N * length)[None, None, :, None, None]
        tables[length] = _Decays(within_NCC.to(dtype), None, arriving, leaving, through)
    return tables


class _LightningAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTNH: Tensor,
        k_BTNH: Tensor,
        v_BTNH: Tensor,
        slopes_N: Tensor,
        document_ids_BP: Tensor | None,
        state_BNHH: Tensor,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        out_BTNH, befores = torch.empty_like(q_BTNH, memory_format=torch.contiguous_format), []
        pieces = list(_pieces(q_BTNH, chunk))
        tables = _compute_decays(slopes_N, {length for _, _, length in pieces}, q_BTNH.dtype)
        for start, stop, length in pieces:
            decays = tables[length].of_documents(
                None if document_ids_BP is None else document_ids_BP[:, start : stop + 1]
            )
            q, k, v = (_split(x[:, start:stop], length) for x in (q_BTNH, k_BTNH, v_BTNH))
            added_BJNHH = _products((k * decays.leaving).transpose(-1, -2), v)
            before_BJNHH, state_BNHH = _accumulate(added_BJNHH, decays.through, state_BNHH)
            scores_XCC = decays.weigh(torch.bmm(_flat(q), _flat(k).transpose(1, 2)))
            out = _products(q * decays.arriving, before_BJNHH)
            _write(out_BTNH[:, start:stop], _add_products(out, scores_XCC, _flat(v)))
            befores.append(before_BJNHH)
        ctx.save_for_backward(q_BTNH, k_BTNH, v_BTNH, slopes_N, document_ids_BP, *befores)
        ctx.chunk = chunk
        return out_BTNH, state_BNHH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTNH: Tensor, grad_state_BNHH: Tensor) -> tuple[Tensor | None, ...]:
        q_BTNH, k_BTNH, v_BTNH, slopes_N, document_ids_BP, *befores = ctx.saved_tensors
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BTNH, k_BTNH, v_BTNH)]
        pieces = list(_pieces(q_BTNH, ctx.chunk))
        tables = _compute_decays(slopes_N, {length for _, _, length in pieces}, q_BTNH.dtype)
        for (start, stop, length), before_BJNHH in zip(pieces[::-1], befores[::-1], strict=True):
            decays = tables[length].of_documents(
                None if document_ids_BP is None else document_ids_BP[:, start : stop + 1]
            )
            q, k, v, grad = (_split(x[:, start:stop], length) for x in (q_BTNH, k_BTNH, v_BTNH, grad_BTNH))
            # What the outputs of a chunk want of the state before it, then what all that follows wants of the one
            # behind it.
            wanted_BJNHH = _products((q * decays.arriving).transpose(-1, -2), grad)
            behind_BJNHH, grad_state_BNHH = _accumulate(wanted_BJNHH.flip(1), decays.through.flip(1), grad_state_BNHH)
            behind_BJNHH = behind_BJNHH.flip(1)

            scores_XCC = decays.weigh(torch.bmm(_flat(q), _flat(k).transpose(1, 2)))
            grad_scores_XCC = decays.weigh(torch.bmm(_flat(grad), _flat(v).transpose(1, 2)))
            grad_q = _products(grad, before_BJNHH.transpose(-1, -2)).mul_(decays.arriving)
            grad_k = _products(v, behind_BJNHH.transpose(-1, -2)).mul_(decays.leaving)
            grad_v = _products(k * decays.leaving, behind_BJNHH)
            _write(grads[0][:, start:stop], _add_products(grad_q, grad_scores_XCC, _flat(k)))
            _write(grads[1][:, start:stop], _add_products(grad_k, grad_scores_XCC.transpose(1, 2), _flat(q)))
            _write(grads[2][:, start:stop], _add_products(grad_v, scores_XCC.transpose(1, 2), _flat(grad)))
        return *grads, None, None, grad_state_BNHH, None


def _pieces(q_BTNH: Tensor, chunk: int) -> Iterator[tuple[int, int, int]]:
    """First token, the one behind the last, and length of the chunks of each piece: whole ones, then what is left."""
    n_batch, n_tokens, n_heads, _ = q_BTNH.shape
    n_chunks = n_tokens // chunk
    n_at_a_time = max(1, MAX_PAIRS // (n_batch * n_heads * chunk**2), -(-n_chunks // MAX_PIECES))
    for first in range(0, n_chunks, n_at_a_time):
        yield first * chunk, min(first + n_at_a_time, n_chunks) * chunk, chunk
    if n_tokens % chunk:
        yield n_chunks * chunk, n_tokens, n_tokens % chunk


def _split(x_BTNH: Tensor, length: int) -> Tensor:
    """(B, J, N, C, H), contiguous: what batched products take without a copy of their own."""
    return x_BTNH.unflatten(1, (-1, length)).transpose(2, 3).contiguous()


def _write(memory_BTNH: Tensor, x_BJNCH: Tensor) -> None:
    memory_BTNH.unflatten(1, (x_BJNCH.shape[1], x_BJNCH.shape[3])).copy_(x_BJNCH.transpose(2, 3))


def _flat(x_BJNRS: Tensor) -> Tensor:
    return x_BJNRS.flatten(0, 2)


def _products(a_BJNRS: Tensor, b_BJNSU: Tensor) -> Tensor:
    return torch.bmm(_flat(a_BJNRS), _flat(b_BJNSU)).view(*a_BJNRS.shape[:-1], b_BJNSU.shape[-1])


def _add_products(sum_BJNRS: Tensor, a_XRU: Tensor, b_XUS: Tensor) -> Tensor:
    """In place."""
    sum_XRS = _flat(sum_BJNRS)
    torch.baddbmm(sum_XRS, a_XRU, b_XUS, out=sum_XRS)
    return sum_BJNRS


def _accumulate(added_BJNHH: Tensor, through: Tensor, state_BNHH: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk (B, J, N, H, H), in the dtype of added, and the one behind the last, in its own.

    Args:
        added_BJNHH: what each chunk adds to what is left of the state before it.
        through: how much is left, (B or 1, J or 1, N, 1, 1).
        state_BNHH: before the first chunk.
    """
    n_chunks = added_BJNHH.shape[1]
    states = []
    for j, through_BN11 in enumerate(through.expand(-1, n_chunks, -1, -1, -1).unbind(1)):
        states.append(state_BNHH.to(added_BJNHH.dtype))
        state_BNHH = torch.addcmul(added_BJNHH[:, j].to(state_BNHH.dtype), state_BNHH, through_BN11)
    return torch.stack(states, dim=1), state_BNHH

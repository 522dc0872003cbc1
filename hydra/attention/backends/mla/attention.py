"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; norms: section 3.1.2).

What a head needs of a token is projected up from one latent, except for one rotated key that all heads share: latent
and shared key are all that a cache keeps. Two forms give the same outputs:

- naive, for training and prompts: keys and values of all heads are made, and attended to as in any other attention;
- absorbed, for decoding: each query is taken through its head's key projection into the space of the latent, which then
  is key and value of all heads at once, and what is attended to goes through the head's value projection afterwards.

B batch, T new tokens, S tokens so far, D model width, N heads, L width of the latent, C and R channels of a head's
score without and with rotation, U value width, E = L + R what is cached of a token.
"""

import dataclasses

import torch
from torch import Tensor, nn

from hydra.attention.backends.mla.spec import MLASpec
from hydra.attention.base import AttentionBackend, AttentionCache, count_visible_pairs, write_tokens
from hydra.attention.core import softmax_attention
from hydra.attention.masks import AttentionContext, TokenHistory, causal_mask, interval_mask, to_additive
from hydra.kernels.qk_norm_rope import qk_norm_rope
from hydra.layers.norms import RMSNorm

NORM_EPS = 1e-6
MAX_ABSORBED_TOKENS = 256
"""The absorbed form holds the scores of all pairs of a call at once."""


@dataclasses.dataclass
class LatentCache(AttentionCache):
    """Latents and shared keys side by side, so that together they are what an absorbed query is scored with."""

    compressed_BSE: Tensor
    """Latent after its norm (the first L columns) and shared key after its rotation (the last R)."""

    def token_tensors(self) -> list[Tensor]:
        """Tensors with a place for each token."""
        return [self.compressed_BSE]

    def append(self, compressed_BTE: Tensor, n_past: int | Tensor) -> Tensor:
        """Write new tokens behind the first n_past, return those of all tokens so far; see write_tokens."""
        return write_tokens(self.compressed_BSE, compressed_BTE, n_past, token_axis=1)


class LatentAttention(AttentionBackend):
    """Latent attention with a latent for queries too if the spec has one. Linears have no bias."""

    spec: MLASpec

    def __init__(self, spec: MLASpec) -> None:
        super().__init__(spec)
        query_width = spec.n_heads * spec.score_width
        if spec.q_latent_width:
            self.q_down_proj = nn.Linear(spec.d_model, spec.q_latent_width, bias=False)
            self.q_norm = RMSNorm(spec.q_latent_width, eps=NORM_EPS)
            self.q_up_proj = nn.Linear(spec.q_latent_width, query_width, bias=False)
        else:
            self.q_proj = nn.Linear(spec.d_model, query_width, bias=False)
        self.kv_down_proj = nn.Linear(spec.d_model, spec.cache_width, bias=False)
        self.kv_norm = RMSNorm(spec.kv_latent_width, eps=NORM_EPS)
        kv_width = spec.n_heads * (spec.nope_width + spec.value_width)
        self.kv_up_proj = nn.Linear(spec.kv_latent_width, kv_width, bias=False)
        self.o_proj = nn.Linear(spec.n_heads * spec.value_width, spec.d_model, bias=False)

    def prepare(self, context: AttentionContext) -> AttentionContext:
        """See AttentionBackend.prepare."""
        spec = self.spec
        rotary = (spec.rotary_width, spec.rope_base) if spec.rotary_width else None
        return context.specialise(self.o_proj.weight.dtype, rotary=rotary)

    def attend(self, x_BTD: Tensor, context: AttentionContext, cache: AttentionCache | None) -> Tensor:
        """See AttentionBackend.forward."""
        q_BTNC, q_BTNR = self.compute_queries(x_BTD, context)
        compressed_BSE = self.compress(x_BTD, context)
        if cache is not None:
            assert isinstance(cache, LatentCache), type(cache)
            compressed_BSE = cache.append(compressed_BSE, context.n_past)
        if is_absorbed(self.spec, x_BTD.shape[1], context.n_past):
            out_BTNU = self.attend_absorbed(q_BTNC, q_BTNR, compressed_BSE, build_mask(context))
        else:
            q_BNTX = torch.cat([q_BTNC, q_BTNR], dim=-1).transpose(1, 2)
            k_BNSX, v_BNSU = self.expand(compressed_BSE)
            out_BTNU = softmax_attention(q_BNTX, k_BNSX, v_BNSU, context).transpose(1, 2)
        return self.o_proj(out_BTNU.flatten(2))

    def compute_queries(self, x_BTD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Queries without position q_BTNC, and rotated ones q_BTNR (eqs. 12-14)."""
        spec = self.spec
        q_BTX = self.q_up_proj(self.q_norm(self.q_down_proj(x_BTD))) if spec.q_latent_width else self.q_proj(x_BTD)
        q_BTNX = q_BTX.unflatten(-1, (spec.n_heads, spec.score_width))
        q_BTNC, q_BTNR = q_BTNX.split([spec.nope_width, spec.rotary_width], dim=-1)
        return q_BTNC, self._rotate(q_BTNR, context)

    def compress(self, x_BTD: Tensor, context: AttentionContext) -> Tensor:
        """What is cached, (B, T, E): the latent after its norm and the shared key after its rotation (eqs. 9, 15)."""
        spec = self.spec
        latent_BTL, k_BTR = self.kv_down_proj(x_BTD).split([spec.kv_latent_width, spec.rotary_width], dim=-1)
        k_BTR = self._rotate(k_BTR[:, :, None], context)[:, :, 0]
        return torch.cat([self.kv_norm(latent_BTL).to(k_BTR.dtype), k_BTR], dim=-1)

    def expand(self, compressed_BSE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, N, S, C + R) and values (B, N, S, U) of all heads (eqs. 10, 11, 17)."""
        spec = self.spec
        latent_BSL, k_BSR = compressed_BSE.split([spec.kv_latent_width, spec.rotary_width], dim=-1)
        kv_BSNX = self.kv_up_proj(latent_BSL).unflatten(-1, (spec.n_heads, spec.nope_width + spec.value_width))
        k_BSNC, v_BSNU = kv_BSNX.split([spec.nope_width, spec.value_width], dim=-1)
        k_BSNR = k_BSR[:, :, None].expand(-1, -1, spec.n_heads, -1)
        return torch.cat([k_BSNC, k_BSNR], dim=-1).transpose(1, 2), v_BSNU.transpose(1, 2)

    def attend_absorbed(
        self, q_BTNC: Tensor, q_BTNR: Tensor, compressed_BSE: Tensor, mask_B1TS: Tensor | None
    ) -> Tensor:
        """What the naive form gives, (B, T, N, U), without keys or values of single heads (section 2.1.2).

        Plain products: latents are read in place, once as keys and once as values, by all heads together. Every token
        must see itself.
        """
        spec = self.spec
        n_batch, n_tokens = q_BTNC.shape[:2]
        weight_NXL = self.kv_up_proj.weight.unflatten(0, (spec.n_heads, spec.nope_width + spec.value_width))
        weight_NCL, weight_NUL = weight_NXL.split([spec.nope_width, spec.value_width], dim=1)

        q_NBTC = q_BTNC.permute(2, 0, 1, 3).flatten(1, 2)
        q_NBTL = torch.bmm(q_NBTC, weight_NCL).unflatten(1, (n_batch, n_tokens))
        q_BNTE = torch.cat([q_NBTL.transpose(0, 1), q_BTNR.transpose(1, 2)], dim=-1) * spec.score_width**-0.5
        scores_BXS = torch.bmm(q_BNTE.flatten(1, 2), compressed_BSE.transpose(1, 2))
        scores_BNTS = scores_BXS.unflatten(1, (spec.n_heads, n_tokens))
        if mask_B1TS is not None:
            scores_BNTS = scores_BNTS + mask_B1TS.to(scores_BNTS.dtype)
        compute_dtype = torch.promote_types(scores_BNTS.dtype, torch.float32)
        weights_BNTS = scores_BNTS.softmax(dim=-1, dtype=compute_dtype).to(compressed_BSE.dtype)
        latent_BSL = compressed_BSE[:, :, : spec.kv_latent_width]
        out_BNTL = torch.bmm(weights_BNTS.flatten(1, 2), latent_BSL).unflatten(1, (spec.n_heads, n_tokens))
        out_NBTU = torch.bmm(out_BNTL.transpose(0, 1).flatten(1, 2), weight_NUL.transpose(1, 2))
        return out_NBTU.unflatten(1, (n_batch, n_tokens)).permute(1, 2, 0, 3)

    def _rotate(self, x_BTNR: Tensor, context: AttentionContext) -> Tensor:
        if context.rotary is None:
            return x_BTNR
        return qk_norm_rope(x_BTNR, *context.rotary, norm_eps=None, kernels=self.kernels)

    def new_cache(self, batch_size: int, max_tokens: int, *, history: TokenHistory | None = None) -> LatentCache:
        """See AttentionBackend.new_cache."""
        history = TokenHistory(batch_size, max_tokens) if history is None else history
        compressed_BSE = self.o_proj.weight.new_empty(batch_size, max_tokens, self.spec.cache_width)
        return LatentCache(history, compressed_BSE)

    @property
    def score_width(self) -> int:
        """C + R, or U where values are wider: kernels that take one width get that."""
        return max(self.spec.score_width, self.spec.value_width)

    @property
    def kv_bytes_per_token(self) -> int:
        """L + R elements, whatever the number of heads."""
        return self.spec.cache_width * self.o_proj.weight.itemsize

    @property
    def constant_state_bytes(self) -> int:
        """None: latents and shared keys are all there is."""
        return 0

    def flops(self, n_tokens: int) -> int:
        """2 * matrices * T + 2 N (C + R + U) * causal pairs: the naive form."""
        spec = self.spec
        pair = 2 * spec.n_heads * (spec.score_width + spec.value_width)
        return 2 * spec.n_weights * n_tokens + pair * count_visible_pairs(n_tokens)


def build_mask(context: AttentionContext) -> Tensor | None:
    """What is added to the scores, also for kernels that read no mask; None where a single token sees everything."""
    if context.mask_B1TS is not None:
        return context.mask_B1TS
    assert isinstance(context.n_past, int), "a decode step has a mask"
    n_tokens, first_visible_BT = context.positions_BT.shape[1], context.first_visible_BT
    if first_visible_BT is None and n_tokens == 1:
        return None
    if first_visible_BT is None:
        is_visible_BTS = causal_mask(n_tokens, context.n_past + n_tokens, context.positions_BT.device)[None]
    else:
        is_visible_BTS = interval_mask(first_visible_BT, context.n_past)
    return to_additive(is_visible_BTS, torch.float32)[:, None]


def is_absorbed(spec: MLASpec, n_tokens: int, n_past: int | Tensor) -> bool:
    """Whether n_tokens new tokens behind n_past cached ones are attended to in the absorbed form: where it costs less.

    The naive form projects every token up again and scores C + R channels for values of U; the absorbed one projects
    queries and outputs of the new tokens only, and scores L + R channels for values of L. So single tokens are
    absorbed and long chunks are not; for the shape of DeepSeek-V2-Lite the limit is 170 tokens behind a long past.
    Without a past the naive form is taken: all tokens are projected either way.
    """
    if isinstance(n_past, Tensor):
        return True
    if n_past == 0 or n_tokens > MAX_ABSORBED_TOKENS:
        return False
    n_pairs = n_tokens * (n_past + n_tokens)
    naive = (
        spec.n_expansion_weights * (n_past + n_tokens) + spec.n_heads * (spec.score_width + spec.value_width) * n_pairs
    )
    absorbed = spec.n_expansion_weights * n_tokens + spec.n_heads * (spec.cache_width + spec.kv_latent_width) * n_pairs
    return absorbed < naive

"""Compressed convolutional attention, CCA and CCGQA (arXiv 2510.04476, Listing 1 and eqs. 7-11).

Queries and keys live in a compressed space: fewer heads than the multi-head reference, of the same width. They are
mixed over a few tokens by two causal convolutions, get the mean of their un-convolved selves added, and are normalised
to norm sqrt(H). Half of the value channels come from the previous token. Nothing is projected up again but by o_proj.

B batch, T new tokens, S tokens so far, D model width, N query heads, K key/value heads, G = N / K, M = N + K heads in
the convolutions, H head width, C = M H channels of queries and keys together, R = k0 + k1 - 2 tokens that the
convolutions look back, P = R + T, V = K H / 2 value channels that come from the previous token.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydra.attention.backends.ccgqa.spec import CCGQASpec
from hydra.attention.base import AttentionBackend, AttentionCache, KeyValueCache, count_visible_pairs
from hydra.attention.core import softmax_attention
from hydra.attention.masks import AttentionContext, TokenHistory
from hydra.kernels.cca_convolution import cca_convolution
from hydra.kernels.qk_norm_rope import qk_norm_rope

# The norm is floored at 1e-12 (released code), which F.rms_norm wants as the floor of a mean square.
NORM_EPS = 1e-24


@dataclasses.dataclass
class CCGQACache(KeyValueCache):
    """Keys and values, and what the convolutions and the value shift need of the tokens before."""

    past_u_BRC: Tensor
    """Queries and keys before the convolutions, of the last R tokens; zeros before the first token."""
    past_v_B1V: Tensor
    """The projection of the last token that the next token's values take half of their channels from."""

    def state_tensors(self) -> list[Tensor]:
        """Tensors whose size does not depend on the number of tokens."""
        return [self.past_u_BRC, self.past_v_B1V]


class CompressedConvolutionalAttention(AttentionBackend):
    """CCGQA; CCA with n_query_heads == n_kv_heads. Linears have no bias, both convolutions have one."""

    spec: CCGQASpec

    def __init__(self, spec: CCGQASpec) -> None:
        super().__init__(spec)
        n_channels = spec.query_width + spec.key_width
        self.q_proj = nn.Linear(spec.d_model, spec.query_width, bias=False)
        self.k_proj = nn.Linear(spec.d_model, spec.key_width, bias=False)
        self.v_proj = nn.Linear(spec.d_model, spec.key_width // 2, bias=False)
        self.v_previous_proj = nn.Linear(spec.d_model, spec.key_width // 2, bias=False)
        self.o_proj = nn.Linear(spec.query_width, spec.d_model, bias=False)
        # The two modules hold parameters of the released shapes; cca_convolution does the work.
        self.conv0 = nn.Conv1d(n_channels, n_channels, spec.conv_kernel_0, groups=n_channels)
        self.conv1 = nn.Conv1d(n_channels, n_channels, spec.conv_kernel_1, groups=spec.n_query_heads + spec.n_kv_heads)
        self.temp = nn.Parameter(torch.zeros(spec.n_kv_heads))

    def prepare(self, context: AttentionContext) -> AttentionContext:
        """See AttentionBackend.prepare."""
        rotary = (self.spec.rotary_width, self.spec.rope_base)
        return context.specialise(self.q_proj.weight.dtype, rotary=rotary)

    def attend(self, x_BTD: Tensor, context: AttentionContext, cache: AttentionCache | None) -> Tensor:
        """See AttentionBackend.forward."""
        assert cache is None or isinstance(cache, CCGQACache), type(cache)
        q_BTNH, k_BTKH = self.mix_queries_keys(x_BTD, context, cache)
        v_BTKH = self.compute_values(x_BTD, context, cache)
        assert context.rotary is not None
        q_BNTH = self.normalise(q_BTNH, context.rotary, None, v_BTKH.dtype).transpose(1, 2)
        k_BKSH = self.normalise(k_BTKH, context.rotary, self.temp, v_BTKH.dtype).transpose(1, 2)
        v_BKSH = v_BTKH.transpose(1, 2)
        if cache is not None:
            k_BKSH, v_BKSH = cache.append(k_BKSH, v_BKSH, context.n_past)
        out_BNTH = softmax_attention(q_BNTH, k_BKSH, v_BKSH, context)
        return self.o_proj(out_BNTH.transpose(1, 2).flatten(2))

    def normalise(
        self, x_BTMH: Tensor, rotary: tuple[Tensor, Tensor], temp_M: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """sqrt(H) x / |x| over each head, times exp(temp) (eqs. 9, 10), rotated; in float32 at least, then rounded."""
        # torch's operators round to the dtype of what they get after each step, Triton's kernel only at its end.
        if self.kernels == "torch":
            x_BTMH = x_BTMH.to(torch.promote_types(x_BTMH.dtype, torch.float32))
        return qk_norm_rope(x_BTMH, *rotary, norm_eps=NORM_EPS, temp_N=temp_M, dtype=dtype, kernels=self.kernels)

    def mix_queries_keys(
        self, x_BTD: Tensor, context: AttentionContext, cache: CCGQACache | None
    ) -> tuple[Tensor, Tensor]:
        """q_BTNH and k_BTKH before their norm: convolved, plus their un-convolved mean (Listing 1, eqs. 7, 8)."""
        spec = self.spec
        u_BTC = torch.cat([self.q_proj(x_BTD), self.k_proj(x_BTD)], dim=-1)
        assert self.conv0.bias is not None
        assert self.conv1.bias is not None
        q_BTNH, k_BTKH = cca_convolution(
            u_BTC,
            None if cache is None else cache.past_u_BRC,
            self.conv0.weight,
            self.conv0.bias,
            self.conv1.weight,
            self.conv1.bias,
            spec.n_kv_heads,
            context.recent_document_ids(spec.n_past_columns),
            self.kernels,
        )
        if cache is not None:
            u_BPC = torch.cat([cache.past_u_BRC, u_BTC], dim=1)
            cache.past_u_BRC.copy_(u_BPC[:, u_BPC.shape[1] - spec.n_past_columns :])
        return q_BTNH, k_BTKH

    def compute_values(self, x_BTD: Tensor, context: AttentionContext, cache: CCGQACache | None) -> Tensor:
        """Values whose first half of channels comes from the token and second half from the one before (eq. 11)."""
        previous_BTV = self.v_previous_proj(x_BTD)
        if cache is None:
            shifted_BTV = F.pad(previous_BTV, (0, 0, 1, -1))
        else:
            shifted_BTV = torch.cat([cache.past_v_B1V, previous_BTV[:, :-1]], dim=1)
            cache.past_v_B1V.copy_(previous_BTV[:, -1:])
        ids_BP = context.recent_document_ids(1)
        if ids_BP is not None:
            shifted_BTV = shifted_BTV.masked_fill((ids_BP[:, 1:] != ids_BP[:, :-1])[:, :, None], 0)
        v_BTC = torch.cat([self.v_proj(x_BTD), shifted_BTV], dim=-1)
        return v_BTC.unflatten(2, (self.spec.n_kv_heads, self.spec.head_width))

    def new_cache(self, batch_size: int, max_tokens: int, *, history: TokenHistory | None = None) -> CCGQACache:
        """See AttentionBackend.new_cache. Keys are stored after norm, temperature and rotary embedding."""
        spec = self.spec
        history = TokenHistory(batch_size, max_tokens) if history is None else history
        k_BKSH, v_BKSH = self.empty_kv(batch_size, spec.n_kv_heads, max_tokens)
        past_u_BRC = k_BKSH.new_zeros(batch_size, spec.n_past_columns, spec.query_width + spec.key_width)
        past_v_B1V = k_BKSH.new_zeros(batch_size, 1, spec.key_width // 2)
        return CCGQACache(history, k_BKSH, v_BKSH, past_u_BRC, past_v_B1V)

    @property
    def kv_bytes_per_token(self) -> int:
        """2 lk elements, whatever the number of query heads."""
        return 2 * self.spec.key_width * self.q_proj.weight.itemsize

    @property
    def constant_state_bytes(self) -> int:
        """R C elements for the convolutions and lk / 2 for the value shift."""
        spec = self.spec
        n_elements = spec.n_past_columns * (spec.query_width + spec.key_width) + spec.key_width // 2
        return n_elements * self.q_proj.weight.itemsize

    def flops(self, n_tokens: int) -> int:
        """2 * (projections + convolution weights) * T + 4 lq * causal pairs."""
        spec = self.spec
        n_linear = 2 * spec.d_model * (spec.query_width + spec.key_width)
        n_heads = spec.n_query_heads + spec.n_kv_heads
        n_convolution = n_heads * spec.head_width * (spec.conv_kernel_0 + spec.head_width * spec.conv_kernel_1)
        return 2 * (n_linear + n_convolution) * n_tokens + 4 * spec.query_width * count_visible_pairs(n_tokens)

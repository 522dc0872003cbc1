"""Compressed convolutional attention, CCA and CCGQA (arXiv 2510.04476, Listing 1 and eqs. 7-11).

Queries and keys live in a compressed space: fewer heads than the multi-head reference, of the same width. They are
mixed over a few tokens by two causal convolutions, get the mean of their un-convolved selves added, and are normalised
to norm sqrt(H). Half of the value channels come from the previous token. Nothing is projected up again but by o_proj.

B batch, T new tokens, S tokens so far, D model width, N query heads, K key/value heads, G = N / K, M = N + K heads in
the convolutions, H head width, C = M H channels of queries and keys together, R = k0 + k1 - 2 tokens that the
convolutions look back, P = R + T, V = K H / 2 value channels that come from the previous token.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydra.attention.backends.ccgqa.spec import CCGQASpec
from hydra.attention.base import AttentionBackend, AttentionCache, KeyValueCache, count_visible_pairs
from hydra.attention.core import softmax_attention
from hydra.attention.masks import AttentionContext, TokenHistory
from hydra.kernels.qk_norm_rope import qk_norm_rope

# The norm is floored at 1e-12 (released code), which F.rms_norm wants as the floor of a mean square.
NORM_EPS = 1e-24
SUMMED_TOKENS = 64
"""Tokens whose gradients of the first convolution are added up first, in compiled code."""


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
        # The two modules hold parameters of the released shapes; convolve_causally does the work.
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
        q_BNTH = self.normalise(q_BTNH, context.rotary, None).to(v_BTKH.dtype).transpose(1, 2)
        k_BKSH = self.normalise(k_BTKH, context.rotary, self.temp).to(v_BTKH.dtype).transpose(1, 2)
        v_BKSH = v_BTKH.transpose(1, 2)
        if cache is not None:
            k_BKSH, v_BKSH = cache.append(k_BKSH, v_BKSH, context.n_past)
        out_BNTH = softmax_attention(q_BNTH, k_BKSH, v_BKSH, context)
        return self.o_proj(out_BNTH.transpose(1, 2).flatten(2))

    def normalise(self, x_BTMH: Tensor, rotary: tuple[Tensor, Tensor], temp_M: Tensor | None) -> Tensor:
        """sqrt(H) x / |x| over each head, times exp(temp) (eqs. 9, 10), rotated; computed in float32 at least."""
        # torch's operators round to the dtype of what they get after each step, Triton's kernel only at its end.
        if self.kernels == "torch":
            x_BTMH = x_BTMH.to(torch.promote_types(x_BTMH.dtype, torch.float32))
        return qk_norm_rope(x_BTMH, *rotary, norm_eps=NORM_EPS, temp_N=temp_M, kernels=self.kernels)

    def mix_queries_keys(
        self, x_BTD: Tensor, context: AttentionContext, cache: CCGQACache | None
    ) -> tuple[Tensor, Tensor]:
        """q_BTNH and k_BTKH before their norm: convolved, plus their un-convolved mean (Listing 1, eqs. 7, 8)."""
        spec = self.spec
        projected = [self.q_proj(x_BTD), self.k_proj(x_BTD)]
        n_past = spec.n_past_columns
        if cache is None:  # padded first, so that compiled code writes them once
            u_BPC = torch.cat([F.pad(part, (0, 0, n_past, 0)) for part in projected], dim=-1)
        else:
            u_BPC = torch.cat([cache.past_u_BRC, torch.cat(projected, dim=-1)], dim=1)
            cache.past_u_BRC.copy_(u_BPC[:, u_BPC.shape[1] - n_past :])
        mixed_BTMH = convolve_causally(u_BPC, self.conv0, self.conv1, context.recent_document_ids(n_past))

        u_BTMH = u_BPC[:, n_past:].unflatten(2, (-1, spec.head_width))
        q_BTKGH = u_BTMH[:, :, : spec.n_query_heads].unflatten(2, (spec.n_kv_heads, -1))
        k_BTK1H = u_BTMH[:, :, spec.n_query_heads :, None]
        mean_q_BTKGH = 0.5 * (q_BTKGH + k_BTK1H)
        mean_k_BTKH = mean_q_BTKGH.mean(dim=3)
        q_BTNH = mixed_BTMH[:, :, : spec.n_query_heads] + mean_q_BTKGH.flatten(2, 3)
        k_BTKH = mixed_BTMH[:, :, spec.n_query_heads :] + mean_k_BTKH
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


def convolve_causally(u_BPC: Tensor, conv0: nn.Conv1d, conv1: nn.Conv1d, document_ids_BP: Tensor | None) -> Tensor:
    """Both convolutions of Listing 1, in [B, T, C] layout; every document starts as if zeros stood before it.

    The paper pads once, before conv0, so at the places before a document conv0 yields its bias. Hence conv0's bias adds
    the same constant to every output of conv1. It is moved into the bias of conv1 here, after which places before a
    document are zero for both convolutions.

    Args:
        u_BPC: the T new tokens behind the R = k0 + k1 - 2 before them.
        conv0: depthwise, weight (C, 1, k0).
        conv1: one group for each head, weight (C, H, k1).
        document_ids_BP: document of each of the P tokens, or None for one document.
    Returns:
        (B, T, M, H), strided.
    """
    n_taps_0, n_taps_1, n_heads = conv0.kernel_size[0], conv1.kernel_size[0], conv1.groups
    width = conv1.in_channels // n_heads
    n_batch, n_tokens = u_BPC.shape[0], u_BPC.shape[1] - (n_taps_0 - 1) - (n_taps_1 - 1)

    n_middle = n_tokens + n_taps_1 - 1
    # Tap by tap in memory: compiled code takes no vectors of every k0-th number.
    weight_0_kC = torch.stack(conv0.weight[:, 0].unbind(-1))
    weight_0_BQC_taps = [_OverTokens.apply(weight_0_C, n_batch, n_middle) for weight_0_C in weight_0_kC]
    z_BQC = delay(u_BPC, 0, n_middle, document_ids_BP) * weight_0_BQC_taps[-1]
    for tokens_back in range(1, n_taps_0):
        z_BQC = torch.addcmul(
            z_BQC, delay(u_BPC, tokens_back, n_middle, document_ids_BP), weight_0_BQC_taps[-1 - tokens_back]
        )

    ids_BQ = None if document_ids_BP is None else document_ids_BP[:, n_taps_0 - 1 :]
    taps_MBTH = [
        delay(z_BQC, tokens_back, n_tokens, ids_BQ).unflatten(2, (n_heads, width)).permute(2, 0, 1, 3)
        for tokens_back in range(n_taps_1 - 1, -1, -1)
    ]
    # One matrix product per head over its k1 H inputs.
    inputs_MXI = torch.cat(taps_MBTH, dim=-1).flatten(1, 2)
    weight_MOIk = conv1.weight.view(n_heads, width, width, n_taps_1)
    weight_MIO = weight_MOIk.permute(0, 3, 2, 1).reshape(n_heads, n_taps_1 * width, width)
    assert conv0.bias is not None
    assert conv1.bias is not None
    bias_0_M1H = conv0.bias.view(n_heads, 1, width)
    bias_M1H = conv1.bias.view(n_heads, 1, width) + (weight_MOIk.sum(-1) * bias_0_M1H).sum(-1)[:, None]
    out_MXH = _ContiguousGradient.apply(torch.baddbmm(bias_M1H, inputs_MXI, weight_MIO))
    return out_MXH.view(n_heads, n_batch, n_tokens, width).permute(1, 2, 0, 3)


class _ContiguousGradient(torch.autograd.Function):
    """Nothing, whose gradient is contiguous.

    That of heads used side by side arrives as a strided view, of which matrix products would make copies by themselves,
    and slowly. Asked for here, contiguous memory is what compiled code writes it to in the first place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


class _OverTokens(torch.autograd.Function):
    """Channels repeated for every token, whose gradient compiled code adds up in two steps.

    In one step it goes through all tokens for every 32 channels, which is through memory as slowly as can be.
    """

    @staticmethod
    def forward(ctx: Any, x_C: Tensor, n_batch: int, n_tokens: int) -> Tensor:
        return x_C.expand(n_batch, n_tokens, -1)

    @staticmethod
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor, None, None]:
        n_blocks = grad_BTC.shape[1] // SUMMED_TOKENS
        if n_blocks == 0 or not torch.compiler.is_compiling():
            return grad_BTC.sum((0, 1)), None, None
        whole_BTC, rest_BTC = grad_BTC.tensor_split([n_blocks * SUMMED_TOKENS], dim=1)
        parts_BXC = whole_BTC.unflatten(1, (n_blocks, SUMMED_TOKENS)).sum(2)
        return parts_BXC.sum((0, 1)) + rest_BTC.sum((0, 1)), None, None


def delay(x_BPC: Tensor, tokens_back: int, n_outputs: int, document_ids_BP: Tensor | None) -> Tensor:
    """What stood tokens_back before each of the last n_outputs tokens; zero where that is another document."""
    stop = x_BPC.shape[1] - tokens_back
    delayed_BTC = x_BPC[:, stop - n_outputs : stop]
    if document_ids_BP is None or tokens_back == 0:
        return delayed_BTC
    is_other_BT = document_ids_BP[:, -n_outputs:] != document_ids_BP[:, stop - n_outputs : stop]
    return delayed_BTC.masked_fill(is_other_BT[:, :, None], 0)

"""The convolution pair of compressed convolutional attention and the query-key mean (arXiv 2510.04476, Listing 1).

B batch, T new tokens, N query heads, K key/value heads, G = N / K, M = N + K heads in the convolutions, H head width,
C = M H channels of queries and keys, J taps, R = k0 + k1 - 2 tokens that the convolutions look back, P = R + T.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SUMMED_TOKENS = 64
"""Tokens whose gradients of the first convolution are added up first, in compiled code."""


def cca_convolution(
    u_BTC: Tensor,
    past_u_BRC: Tensor | None,
    weight_0_C1J: Tensor,
    bias_0_C: Tensor,
    weight_1_CHJ: Tensor,
    bias_1_C: Tensor,
    n_kv_heads: int,
    document_ids_BP: Tensor | None = None,
    kernels: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Queries and keys after both causal convolutions, with the mean of their un-convolved selves added (eqs. 7, 8).

    Args:
        u_BTC: queries, then keys, before the convolutions.
        past_u_BRC: the same of the R tokens before; None: zeros.
        weight_0_C1J, bias_0_C: of conv0, depthwise.
        weight_1_CHJ, bias_1_C: of conv1, one group for each head.
        n_kv_heads: K.
        document_ids_BP: document of the R tokens before and of the T tokens; every document starts as if zeros stood
            before it. None: all are one document.
        kernels: one of hydra.kernels.dispatch.KERNELS.
    Returns:
        q_BTNH and k_BTKH in the dtype of u.
    Raises:
        ConfigError: kernels=triton cannot take this dtype or head width.
    """
    if kernels == "triton":
        from hydra.kernels._triton import cca_convolution as triton_kernels

        return triton_kernels.cca_convolution(
            u_BTC, past_u_BRC, weight_0_C1J, bias_0_C, weight_1_CHJ, bias_1_C, n_kv_heads, document_ids_BP
        )
    if past_u_BRC is None:
        u_BPC = F.pad(u_BTC, (0, 0, weight_0_C1J.shape[2] + weight_1_CHJ.shape[2] - 2, 0))
    else:
        u_BPC = torch.cat([past_u_BRC, u_BTC], dim=1)
    mixed_BTMH = convolve_causally(u_BPC, weight_0_C1J, bias_0_C, weight_1_CHJ, bias_1_C, document_ids_BP)

    # Of the padded ones, so that compiled code writes them once.
    u_BTMH = u_BPC[:, u_BPC.shape[1] - u_BTC.shape[1] :].unflatten(2, (-1, weight_1_CHJ.shape[1]))
    n_query_heads = u_BTMH.shape[2] - n_kv_heads
    q_BTKGH = u_BTMH[:, :, :n_query_heads].unflatten(2, (n_kv_heads, -1))
    k_BTK1H = u_BTMH[:, :, n_query_heads:, None]
    mean_q_BTKGH = 0.5 * (q_BTKGH + k_BTK1H)
    mean_k_BTKH = mean_q_BTKGH.mean(dim=3)
    q_BTNH = mixed_BTMH[:, :, :n_query_heads] + mean_q_BTKGH.flatten(2, 3)
    k_BTKH = mixed_BTMH[:, :, n_query_heads:] + mean_k_BTKH
    return q_BTNH, k_BTKH


def convolve_causally(
    u_BPC: Tensor,
    weight_0_C1J: Tensor,
    bias_0_C: Tensor,
    weight_1_CHJ: Tensor,
    bias_1_C: Tensor,
    document_ids_BP: Tensor | None,
) -> Tensor:
    """Both convolutions of Listing 1, in [B, T, C] layout; every document starts as if zeros stood before it.

    The paper pads once, before conv0, so at the places before a document conv0 yields its bias. Hence conv0's bias adds
    the same constant to every output of conv1. It is moved into the bias of conv1 here, after which places before a
    document are zero for both convolutions.

    Args:
        u_BPC: the T new tokens behind the R = k0 + k1 - 2 before them.
        weight_0_C1J, bias_0_C: of conv0, depthwise.
        weight_1_CHJ, bias_1_C: of conv1, one group for each head.
        document_ids_BP: document of each of the P tokens, or None for one document.
    Returns:
        (B, T, M, H), strided.
    """
    n_taps_0, n_taps_1 = weight_0_C1J.shape[2], weight_1_CHJ.shape[2]
    width = weight_1_CHJ.shape[1]
    n_heads = weight_1_CHJ.shape[0] // width
    n_batch, n_tokens = u_BPC.shape[0], u_BPC.shape[1] - (n_taps_0 - 1) - (n_taps_1 - 1)

    n_middle = n_tokens + n_taps_1 - 1
    # Tap by tap in memory: compiled code takes no vectors of every k0-th number.
    weight_0_JC = torch.stack(weight_0_C1J[:, 0].unbind(-1))
    taps_0 = [_OverTokens.apply(weight_0_C, n_batch, n_middle) for weight_0_C in weight_0_JC]
    z_BQC = delay(u_BPC, 0, n_middle, document_ids_BP) * taps_0[-1]
    for tokens_back in range(1, n_taps_0):
        z_BQC = torch.addcmul(z_BQC, delay(u_BPC, tokens_back, n_middle, document_ids_BP), taps_0[-1 - tokens_back])

    ids_BQ = None if document_ids_BP is None else document_ids_BP[:, n_taps_0 - 1 :]
    taps_MBTH = [
        delay(z_BQC, tokens_back, n_tokens, ids_BQ).unflatten(2, (n_heads, width)).permute(2, 0, 1, 3)
        for tokens_back in range(n_taps_1 - 1, -1, -1)
    ]
    # One matrix product per head over its k1 H inputs.
    inputs_MXI = torch.cat(taps_MBTH, dim=-1).flatten(1, 2)
    weight_MOIk = weight_1_CHJ.view(n_heads, width, width, n_taps_1)
    weight_MIO = weight_MOIk.permute(0, 3, 2, 1).reshape(n_heads, n_taps_1 * width, width)
    bias_0_M1H = bias_0_C.view(n_heads, 1, width)
    bias_M1H = bias_1_C.view(n_heads, 1, width) + (weight_MOIk.sum(-1) * bias_0_M1H).sum(-1)[:, None]
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

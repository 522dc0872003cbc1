"""The convolution pair of compressed convolutional attention and the query-key mean, slowly: one document at a time.

B batch, T tokens, N query heads, K key/value heads, H head width, C = (N + K) H, J taps, R = k0 + k1 - 2, P = R + T.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cca_convolution(
    u_BTC: Tensor,
    past_u_BRC: Tensor | None,
    weight_0_C1J: Tensor,
    bias_0_C: Tensor,
    weight_1_CHJ: Tensor,
    bias_1_C: Tensor,
    n_kv_heads: int,
    document_ids_BP: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q_BTNH and k_BTKH in float64; see hydra.kernels.cca_convolution."""
    u_BTC, weight_0_C1J, bias_0_C, weight_1_CHJ, bias_1_C = (
        tensor.double() for tensor in (u_BTC, weight_0_C1J, bias_0_C, weight_1_CHJ, bias_1_C)
    )
    n_before = weight_0_C1J.shape[2] + weight_1_CHJ.shape[2] - 2
    width = weight_1_CHJ.shape[1]
    n_query_heads = u_BTC.shape[2] // width - n_kv_heads
    queries, keys = [], []
    for row, u_TC in enumerate(u_BTC):
        past_RC = u_TC.new_zeros(n_before, u_TC.shape[1]) if past_u_BRC is None else past_u_BRC[row].double()
        u_PC = torch.cat([past_RC, u_TC])
        ids = [0] * len(u_PC) if document_ids_BP is None else document_ids_BP[row].tolist()
        convolved = []
        for t in range(n_before, len(u_PC)):
            # Listing 1 pads once, before conv0, with zeros in the place of what is not of this document.
            seen = [u_PC[p] if ids[p] == ids[t] else torch.zeros_like(u_PC[p]) for p in range(t - n_before, t + 1)]
            window_1CL = torch.stack(seen, dim=1)[None]
            middle = F.conv1d(window_1CL, weight_0_C1J, bias_0_C, groups=u_PC.shape[1])
            convolved.append(F.conv1d(middle, weight_1_CHJ, bias_1_C, groups=u_PC.shape[1] // width)[0, :, 0])
        convolved_TMH = torch.stack(convolved).unflatten(1, (-1, width))
        u_TMH = u_TC.unflatten(1, (-1, width))
        q_TNH, k_TKH = u_TMH[:, :n_query_heads], u_TMH[:, n_query_heads:]
        # Eqs. 7, 8: query head n belongs to key head n // (N / K).
        mean_q_TNH = 0.5 * (q_TNH + k_TKH.repeat_interleave(n_query_heads // n_kv_heads, dim=1))
        mean_k_TKH = mean_q_TNH.unflatten(1, (n_kv_heads, -1)).mean(2)
        queries.append(convolved_TMH[:, :n_query_heads] + mean_q_TNH)
        keys.append(convolved_TMH[:, n_query_heads:] + mean_k_TKH)
    return torch.stack(queries), torch.stack(keys)

"""Lightning attention, slowly: the recurrence of MiniMax-01 (arXiv 2501.08313, section 2.2), one token at a time.

B batch, T tokens, P = 1 + T, N heads, H head width.
"""

import torch
from torch import Tensor


def lightning_attention(
    q_BTNH: Tensor,
    k_BTNH: Tensor,
    v_BTNH: Tensor,
    slopes_N: Tensor,
    document_ids_BP: Tensor | None = None,
    state_BNHH: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """state <- exp(-slope) state + k^T v, out = q state, in float64; see hydra.kernels.lightning_attention.

    Returns:
        out_BTNH and the state behind the last token, both float64.
    """
    n_batch, n_tokens, n_heads, width = q_BTNH.shape
    q_BTNH, k_BTNH, v_BTNH = q_BTNH.double(), k_BTNH.double(), v_BTNH.double()
    decay_N11 = torch.exp(-slopes_N.double())[:, None, None]
    outs, states = [], []
    for b in range(n_batch):
        state_NHH = q_BTNH.new_zeros(n_heads, width, width) if state_BNHH is None else state_BNHH[b].double()
        out_TNH = []
        for t in range(n_tokens):
            if document_ids_BP is not None and document_ids_BP[b, t + 1] != document_ids_BP[b, t]:
                state_NHH = torch.zeros_like(state_NHH)
            state_NHH = decay_N11 * state_NHH + k_BTNH[b, t, :, :, None] * v_BTNH[b, t, :, None, :]
            out_TNH.append((q_BTNH[b, t, :, :, None] * state_NHH).sum(1))
        outs.append(torch.stack(out_TNH))
        states.append(state_NHH)
    return torch.stack(outs), torch.stack(states)

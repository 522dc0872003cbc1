"""Sigmoid attention (Ramapuram et al., arXiv 2409.04431): weights do not compete, so each is a sigmoid of its score.

B batch, T tokens (S as keys), D model width, N heads, H head width.
"""

import math

import torch
from torch import Tensor, nn


class SigmoidAttention(nn.Module):
    """out_t = sum over s of sigmoid(q_t k_s / sqrt(H) - slope (p_t - p_s) - log n_t) v_s, p being positions.

    n_t is how many tokens the query sees: the paper's bias, which is the log of the whole length, would let an output
    depend on tokens that come later. Slopes are those of ALiBi (Press et al., arXiv 2108.12409), one for each head.
    """

    def __init__(self, spec) -> None:
        super().__init__()
        self.n_heads, self.head_width = spec.n_heads, spec.head_width
        self.qkv_proj = nn.Linear(spec.d_model, 3 * spec.d_model, bias=False)
        self.o_proj = nn.Linear(spec.d_model, spec.d_model, bias=False)

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, document_ids_BT: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        n_tokens = x_BTD.shape[1]
        qkv_3BNTH = self.qkv_proj(x_BTD).unflatten(-1, (3, self.n_heads, self.head_width)).permute(2, 0, 3, 1, 4)
        q_BNTH, k_BNSH, v_BNSH = qkv_3BNTH.unbind()
        is_past_TS = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=x_BTD.device).tril()
        is_visible_BTS = is_past_TS & (document_ids_BT[:, :, None] == document_ids_BT[:, None, :])
        n_visible_BT1 = is_visible_BTS.sum(-1, keepdim=True)
        slopes_N11 = 2.0 ** (-8 / self.n_heads * torch.arange(1, self.n_heads + 1, device=x_BTD.device))[:, None, None]
        distances_BTS = positions_BT[:, :, None] - positions_BT[:, None, :]
        bias_BNTS = -slopes_N11 * distances_BTS[:, None] - n_visible_BT1[:, None].log()
        scores_BNTS = q_BNTH @ k_BNSH.mT / math.sqrt(self.head_width) + bias_BNTS.to(x_BTD.dtype)
        weights_BNTS = scores_BNTS.sigmoid() * is_visible_BTS[:, None]
        return self.o_proj((weights_BNTS @ v_BNSH).transpose(1, 2).flatten(2))

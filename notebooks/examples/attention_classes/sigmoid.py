"""Sigmoid attention (Ramapuram et al., arXiv 2409.04431): weights do not compete, so each is a sigmoid of its score.

B batch, T tokens (S as keys), D model width, N heads, H head width.
"""

import math

import torch
from torch import Tensor, nn


class SigmoidAttention(nn.Module):
    """sum over s of sigmoid(q k_s / sqrt(H) - log n) v_s, where n is how many tokens a query sees."""

    def __init__(self, spec) -> None:
        super().__init__()
        self.n_heads, self.head_width = spec.n_heads, spec.head_width
        self.qkv_proj = nn.Linear(spec.d_model, 3 * spec.d_model, bias=False)
        self.o_proj = nn.Linear(spec.d_model, spec.d_model, bias=False)

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, document_ids_BT: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        qkv_B3NTH = self.qkv_proj(x_BTD).unflatten(-1, (3, self.n_heads, self.head_width)).permute(0, 2, 3, 1, 4)
        q_BNTH, k_BNSH, v_BNSH = qkv_B3NTH.unbind(1)
        n_tokens = x_BTD.shape[1]
        is_past_TS = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=x_BTD.device).tril()
        is_visible_B1TS = (is_past_TS & (document_ids_BT[:, :, None] == document_ids_BT[:, None, :]))[:, None]
        # The published bias is -log(n) of the whole sequence; counted for each query, it does not depend on the length.
        bias_B1T1 = is_visible_B1TS.sum(-1, keepdim=True).to(x_BTD.dtype).log()
        scores_BNTS = q_BNTH @ k_BNSH.mT / math.sqrt(self.head_width) - bias_B1T1
        weights_BNTS = scores_BNTS.sigmoid() * is_visible_B1TS
        return self.o_proj((weights_BNTS @ v_BNSH).transpose(1, 2).flatten(2))

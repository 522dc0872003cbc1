"""A gated recurrence: an average of the past in each channel, with a decay that each token sets anew.

The form is that of minGRU (Feng et al., arXiv 2410.01201, section 3.1): gates read the token and not the state, so that
all states can be computed together.

B batch, T tokens, D model width.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class GatedRecurrence(nn.Module):
    """h_t = (1 - z_t) h_(t-1) + z_t u_t with z_t = sigmoid(W x_t) and u_t = U x_t; out_t = O (h_t silu(G x_t))."""

    def __init__(self, spec) -> None:
        super().__init__()
        self.update_proj = nn.Linear(spec.d_model, spec.d_model)
        self.value_proj = nn.Linear(spec.d_model, spec.d_model, bias=False)
        self.gate_proj = nn.Linear(spec.d_model, spec.d_model, bias=False)
        self.o_proj = nn.Linear(spec.d_model, spec.d_model, bias=False)

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, document_ids_BT: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        update_BTD = self.update_proj(x_BTD).sigmoid()
        state_BTD = update_BTD * self.value_proj(x_BTD)
        is_same_BT = F.pad(document_ids_BT[:, 1:] == document_ids_BT[:, :-1], (1, 0))
        decay_BTD = (1 - update_BTD) * is_same_BT[:, :, None]
        # Doubling: after k steps a state holds its last 2^k tokens, and its decay is the product of theirs.
        shift = 1
        while shift < x_BTD.shape[1]:
            state_BTD = state_BTD + decay_BTD * F.pad(state_BTD, (0, 0, shift, 0))[:, :-shift]
            decay_BTD = decay_BTD * F.pad(decay_BTD, (0, 0, shift, 0))[:, :-shift]
            shift *= 2
        return self.o_proj(state_BTD * F.silu(self.gate_proj(x_BTD)))

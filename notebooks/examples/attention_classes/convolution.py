"""A convolution mixer: each channel is a weighted sum of its last few tokens, gated by the token itself.

As the short convolutions of Hyena (Poli et al., arXiv 2302.10866, section 3.2), alone.

B batch, T tokens, D model width, W kernel size.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvolutionMixer(nn.Module):
    """out_t = O (silu(G x_t) sum over w of k_w V x_(t-w)), where x_(t-w) is of the same document."""

    options: ClassVar = {"kernel_size": 8}

    def __init__(self, spec) -> None:
        super().__init__()
        self.kernel_size = spec.options["kernel_size"]
        self.value_proj = nn.Linear(spec.d_model, spec.d_model, bias=False)
        self.gate_proj = nn.Linear(spec.d_model, spec.d_model, bias=False)
        self.kernel_WD = nn.Parameter(0.3 * torch.randn(self.kernel_size, spec.d_model))
        self.o_proj = nn.Linear(spec.d_model, spec.d_model, bias=False)

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, document_ids_BT: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        value_BTD = self.value_proj(x_BTD)
        mixed_BTD = value_BTD * self.kernel_WD[0]
        for back in range(1, min(self.kernel_size, x_BTD.shape[1])):
            is_same_BT = F.pad(document_ids_BT[:, back:] == document_ids_BT[:, :-back], (back, 0))
            earlier_BTD = F.pad(value_BTD, (0, 0, back, 0))[:, :-back]
            mixed_BTD = mixed_BTD + earlier_BTD * is_same_BT[:, :, None] * self.kernel_WD[back]
        return self.o_proj(mixed_BTD * F.silu(self.gate_proj(x_BTD)))

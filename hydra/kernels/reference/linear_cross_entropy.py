"""Cross-entropy of a linear head, with all logits at once.

X tokens (batch and time flattened), D model width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra.kernels.linear_cross_entropy import IGNORE_INDEX


def linear_cross_entropy(x_XD: Tensor, weight_VD: Tensor, targets_X: Tensor) -> Tensor:
    """Sum of -log softmax(x W^T)[target] over the targets that are not IGNORE_INDEX, in at least float32."""
    dtype = torch.promote_types(x_XD.dtype, torch.float32)
    logits_XV = x_XD.to(dtype) @ weight_VD.to(dtype).T
    return F.cross_entropy(logits_XV, targets_X, ignore_index=IGNORE_INDEX, reduction="sum")

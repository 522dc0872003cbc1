"""What the C++ kernels of a decode step compute, slowly and in plain torch.

O outputs, I inputs, B rows, N query heads, K key/value heads, S tokens that a cache holds, H head width.
"""

import torch
from torch import Tensor


def linear(x_BI: Tensor, weight_OI: Tensor, scales_O: Tensor | None = None) -> Tensor:
    """x W^T in float32, rounded to the dtype of x. With scales: W = scale * (weight - 128), weights in uint8."""
    matrix_OI = weight_OI.float()
    if scales_O is not None:
        matrix_OI = (matrix_OI - 128) * scales_O[:, None]
    return (x_BI.float() @ matrix_OI.T).to(x_BI.dtype)


def single_query_attention(q_BN1H: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask_B11S: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(H) + mask) v in float32; a row that sees nothing gives zeros; what it masks is not read."""
    group = q_BN1H.shape[1] // k_BKSH.shape[1]
    is_hidden_B1S1 = (mask_B11S == -torch.inf).transpose(2, 3)
    k_BNSH = k_BKSH.float().masked_fill(is_hidden_B1S1, 0).repeat_interleave(group, dim=1)
    v_BNSH = v_BKSH.float().masked_fill(is_hidden_B1S1, 0).repeat_interleave(group, dim=1)
    scores_BN1S = q_BN1H.float() @ k_BNSH.transpose(2, 3) * q_BN1H.shape[-1] ** -0.5 + mask_B11S.float()
    sees_nothing_B111 = (mask_B11S == -torch.inf).all(dim=-1, keepdim=True)
    weights_BN1S = scores_BN1S.softmax(dim=-1).masked_fill(sees_nothing_B111, 0.0)
    return (weights_BN1S @ v_BNSH).to(q_BN1H.dtype)

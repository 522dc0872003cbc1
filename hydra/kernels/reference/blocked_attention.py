"""What blocked attention computes, slowly and in plain torch.

B batch, T queries, S keys, K key/value heads, G query heads of each, H head width, E width of value heads.
"""

from torch import Tensor


def blocked_attention(q_BKGTH: Tensor, k_BKSH: Tensor, v_BKSE: Tensor, mask_B1TS: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(H) + mask) v in float64, which is the dtype of the result; all-masked rows give zeros."""
    k_BK1SH, v_BK1SE = k_BKSH.double()[:, :, None], v_BKSE.double()[:, :, None]
    scores_BKGTS = q_BKGTH.double() @ k_BK1SH.transpose(3, 4) * q_BKGTH.shape[-1] ** -0.5
    is_hidden_B11TS = (mask_B1TS.double() == -float("inf"))[:, :, None]
    # A finite floor: an all-masked row has weights then, which are taken away, and no NaN in its gradient.
    scores_BKGTS = scores_BKGTS.masked_fill(is_hidden_B11TS, -1e30)
    weights_BKGTS = scores_BKGTS.softmax(dim=-1).masked_fill(is_hidden_B11TS, 0.0)
    return weights_BKGTS @ v_BK1SE

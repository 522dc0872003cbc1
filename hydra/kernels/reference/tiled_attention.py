"""What tiled attention computes, slowly and in plain torch.

B batch, T queries, S keys, K key/value heads, G query heads of each, H width of queries and keys, E width of values.
"""

import torch
from torch import Tensor


def tiled_attention(
    q_BKGTH: Tensor,
    k_BKSH: Tensor,
    v_BKSE: Tensor,
    first_visible_BT: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v in float64 over the keys first_visible[b, t] to S - T + t, each inclusive; out_BKGTE."""
    n_queries, n_keys = q_BKGTH.shape[3], k_BKSH.shape[2]
    scale = q_BKGTH.shape[-1] ** -0.5 if scale is None else scale
    keys_S = torch.arange(n_keys, device=q_BKGTH.device)
    is_hidden_BTS = (keys_S > torch.arange(n_keys - n_queries, n_keys, device=q_BKGTH.device)[:, None])[None]
    if first_visible_BT is not None:
        is_hidden_BTS = is_hidden_BTS | (keys_S < first_visible_BT[:, :, None])
    scores_BKGTS = q_BKGTH.double() @ k_BKSH.double()[:, :, None].transpose(3, 4) * scale
    scores_BKGTS = scores_BKGTS.masked_fill(is_hidden_BTS[:, None, None], -torch.inf)
    return scores_BKGTS.softmax(dim=-1) @ v_BKSE.double()[:, :, None]

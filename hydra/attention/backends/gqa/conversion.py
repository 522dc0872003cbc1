"""From multi-head to grouped-query attention by the mean of the heads of a group (arXiv 2305.13245, section 2.1).

What comes out is where further training starts (the paper: 5 % of the steps so far), not a finished layer.

D model width, N heads before, K heads after, H head width.
"""

import dataclasses

import torch
from torch import Tensor

from hydra.attention.backends.gqa.attention import GroupedQueryAttention
from hydra.attention.spec import check_divides, check_int


def mean_pool_heads(weight_XD: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """The mean of each n_heads / n_kv_heads neighbouring heads of a key or value projection.

    Args:
        weight_XD: N heads of H rows, (N H, D); any floating dtype.
        n_heads: N, which divides its rows.
        n_kv_heads: K, which divides N.
    Returns:
        (K H, D), in that dtype, to which sums in float32 are rounded.
    Raises:
        ConfigError: n_kv_heads does not divide n_heads.
    """
    check_int("n_kv_heads", n_kv_heads)
    check_divides("n_kv_heads", n_kv_heads, "n_heads", n_heads)
    assert weight_XD.shape[0] % n_heads == 0, (weight_XD.shape, n_heads)
    heads_KGHD = weight_XD.view(n_kv_heads, n_heads // n_kv_heads, -1, weight_XD.shape[1])
    return heads_KGHD.mean(dim=1).flatten(0, 1)


@torch.no_grad()
def convert_to_grouped(layer: GroupedQueryAttention, n_kv_heads: int) -> GroupedQueryAttention:
    """A layer with n_kv_heads key/value heads, each the mean of a group of those of `layer`, which stays as it is.

    Exact where the heads of a group are equal. Queries and output projection are copied.

    Raises:
        ConfigError: n_kv_heads does not divide the key/value heads that there are.
    """
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = mean_pool_heads(state[name], layer.spec.n_kv_heads, n_kv_heads)
    with torch.device("meta"):
        grouped = GroupedQueryAttention(dataclasses.replace(layer.spec, n_kv_heads=n_kv_heads))
    grouped.load_state_dict(state, assign=True)
    return grouped.requires_grad_(True)

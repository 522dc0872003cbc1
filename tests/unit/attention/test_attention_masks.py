import pytest
import torch

from hydra.attention.core import softmax_attention
from hydra.attention.masks import TokenHistory, build_context, causal_mask, document_mask, to_additive
from hydra.testing.specs import document_ids, random_activations
from hydra.testing.tolerances import assert_close


def test_causal_mask_is_aligned_to_the_last_key() -> None:
    expected = [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_mask(2, 4, torch.device("cpu")).int().tolist() == expected


def test_document_mask_and_its_additive_form() -> None:
    mask_BTS = document_mask(torch.tensor([[5, 5, 2]]), 2)
    assert mask_BTS.int().tolist() == [[[1, 1, 0], [0, 0, 1]]]
    assert to_additive(mask_BTS, torch.float32).tolist() == [[[0.0, 0.0, -torch.inf], [-torch.inf, -torch.inf, 0.0]]]


def test_no_mask_is_built_for_one_document() -> None:
    """Causality alone is left to the kernel, which needs no matrix for it."""
    context = build_context(torch.zeros(2, 5, 8))
    assert context.mask_B1TS is None
    assert context.positions_BT.tolist() == [[0, 1, 2, 3, 4]]


def test_context_goes_on_where_the_history_ends() -> None:
    history, ids_BT = TokenHistory(1, 9), document_ids(2, 4)
    build_context(torch.zeros(1, 3, 8), document_ids_BT=ids_BT[:, :3], history=history)
    context = build_context(torch.zeros(1, 3, 8), document_ids_BT=ids_BT[:, 3:], history=history)
    assert (context.n_past, history.n_tokens) == (3, 6)
    assert context.positions_BT.tolist() == [[3, 4, 5]]
    assert context.mask_B1TS is not None
    assert (context.mask_B1TS == 0).int().tolist() == [[[[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]]]
    recent = context.recent_document_ids(2)
    assert recent is not None
    assert recent.tolist() == [[0, 1, 1, 1, 1]]


def test_recent_documents_before_the_first_token_are_filled() -> None:
    recent = build_context(torch.zeros(1, 2, 8), document_ids_BT=torch.tensor([[7, 8]])).recent_document_ids(3)
    assert recent is not None
    assert recent.tolist() == [[7, 7, 7, 7, 8]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 1), (1, 7), (3, 7), (7, 7)])
def test_softmax_attention_is_what_it_says(n_queries: int, n_keys: int, dtype: torch.dtype) -> None:
    """Against the formula, with grouped heads, causal from the bottom right, and the same as an explicit mask."""
    q = random_activations(2, 4, n_queries, 6, dtype=dtype)
    k, v = (random_activations(2, 2, n_keys, 6, dtype=dtype, seed=seed) for seed in (1, 2))
    k_full, v_full = (a.double().repeat_interleave(2, dim=1) for a in (k, v))
    scores = q.double() @ k_full.transpose(2, 3) / 6**0.5
    mask_TS = to_additive(causal_mask(n_queries, n_keys, torch.device("cpu")), torch.float64)
    out = softmax_attention(q, k, v)
    assert out.dtype == dtype
    assert_close(out, (scores + mask_TS).softmax(-1) @ v_full, dtype, "outputs")
    assert_close(softmax_attention(q, k, v, mask_TS[None, None].expand(2, -1, -1, -1)), out, dtype, "explicit mask")

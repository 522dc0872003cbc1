import dataclasses

import pytest
import torch

from hydra.attention.core import softmax_attention
from hydra.attention.masks import (
    FLASH_STARTS,
    AttentionContext,
    TokenHistory,
    build_context,
    causal_mask,
    first_of_document,
    interval_mask,
    to_additive,
)
from hydra.testing.specs import document_ids, random_activations
from hydra.testing.tolerances import assert_close


def test_causal_mask_is_aligned_to_the_last_key() -> None:
    expected = [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_mask(2, 4, torch.device("cpu")).int().tolist() == expected


def test_documents_are_intervals_of_keys() -> None:
    first_BT = first_of_document(torch.tensor([[5, 5, 2, 2, 2], [0, 7, 7, 9, 9]]), 3)
    assert first_BT.tolist() == [[2, 2, 2], [1, 3, 3]]
    assert interval_mask(first_BT, 2)[1].int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert to_additive(first_BT == 2, torch.float32).tolist() == [[0.0] * 3, [-torch.inf] * 3]


def test_a_window_hides_what_is_older() -> None:
    history = TokenHistory(1, 9)
    build_context(torch.zeros(1, 2, 8), history=history)
    context = build_context(torch.zeros(1, 3, 8), history=history)
    windowed = context.specialise(torch.float32, window=2)
    assert windowed.first_visible_BT is not None
    assert windowed.first_visible_BT.tolist() == [[1, 2, 3]]
    assert windowed.mask_B1TS is not None
    assert (windowed.mask_B1TS == 0).int().tolist() == [[[[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]]]
    assert context.specialise(torch.float32, window=5).first_visible_BT is None
    assert context.specialise(torch.float32, window=2) is windowed


def test_a_window_hides_in_a_step_of_static_shapes() -> None:
    mask_B11S = torch.tensor([[0.0, 0, 0, -torch.inf], [0, 0, -torch.inf, -torch.inf]])[:, None, None]
    context = AttentionContext(torch.tensor([2, 1]), torch.tensor([[2], [1]]), mask_B1TS=mask_B11S)
    windowed = context.specialise(torch.float32, window=2)
    assert windowed.mask_B1TS is not None
    assert (windowed.mask_B1TS == 0)[:, 0, 0].int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]
    assert context.specialise(torch.float32).mask_B1TS is mask_B11S


def test_only_kernels_that_read_a_mask_get_one() -> None:
    context = build_context(torch.zeros(2, 5, 8), document_ids_BT=document_ids(2, 3).expand(2, -1), kernel="flash")
    own = context.specialise(torch.float32, window=2)
    assert own.mask_B1TS is None
    assert own.kernel_data.window == (1, 0)
    starts = own.kernel_data.starts
    assert starts.dtype == torch.int32
    assert starts.tolist() == [0, 2, 5, 7] + [10] * (FLASH_STARTS - 4)


def test_no_mask_is_built_for_one_document() -> None:
    """Causality alone is left to the kernel, which needs no matrix for it."""
    context = build_context(torch.zeros(2, 5, 8)).specialise(torch.float32)
    assert context.first_visible_BT is None
    assert context.mask_B1TS is None
    assert context.positions_BT.tolist() == [[0, 1, 2, 3, 4]]


def test_context_goes_on_where_the_history_ends() -> None:
    history, ids_BT = TokenHistory(1, 9), document_ids(2, 4)
    build_context(torch.zeros(1, 3, 8), document_ids_BT=ids_BT[:, :3], history=history)
    context = build_context(torch.zeros(1, 3, 8), document_ids_BT=ids_BT[:, 3:], history=history)
    assert (context.n_past, history.n_tokens) == (3, 6)
    assert context.positions_BT.tolist() == [[3, 4, 5]]
    mask_B1TS = context.specialise(torch.float32).mask_B1TS
    assert mask_B1TS is not None
    assert (mask_B1TS == 0).int().tolist() == [[[[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]]]
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
    context = AttentionContext(n_keys - n_queries, torch.arange(n_queries)[None])
    out = softmax_attention(q, k, v, context)
    assert out.dtype == dtype
    assert_close(out, (scores + mask_TS).softmax(-1) @ v_full, dtype, "outputs")
    masked = dataclasses.replace(context, mask_B1TS=mask_TS[None, None].expand(2, -1, -1, -1))
    assert_close(softmax_attention(q, k, v, masked), out, dtype, "explicit mask")

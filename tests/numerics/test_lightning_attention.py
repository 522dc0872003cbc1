"""Chunked lightning attention against its recurrence: outputs, last state, every gradient, in NaN-poisoned memory."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hydra.kernels import lightning_attention as kernel
from hydra.kernels.lightning_attention import count_lightning_flops, lightning_attention, lightning_attention_step
from hydra.kernels.reference.lightning_attention import lightning_attention as reference
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401
from hydra.testing.specs import document_ids, random_activations
from hydra.testing.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("nan_poisoned_memory")

SLOPES_N = torch.tensor([0.7, 0.03, 1e-5], dtype=torch.float64)
N_BATCH, N_HEADS, WIDTH = 2, 3, 5


def draw(n_tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v, a state, and weights of the outputs and of the last state in a loss."""
    heads, state = (N_BATCH, n_tokens, N_HEADS, WIDTH), (N_BATCH, N_HEADS, WIDTH, WIDTH)
    state_dtype = torch.promote_types(dtype, torch.float32)
    tensors = [random_activations(*heads, dtype=dtype, seed=seed).requires_grad_() for seed in range(3)]
    tensors.append(random_activations(*state, dtype=state_dtype, seed=3).requires_grad_())
    return (*tensors, random_activations(*heads, seed=4), random_activations(*state, seed=5))


def ids_of(n_tokens: int, *first_row: int) -> Tensor:
    """Documents of the token before and of n_tokens tokens: those of the first row; one of its own for the second."""
    second = torch.cat([torch.tensor([[9]]), torch.full((1, n_tokens), 4)], dim=1)
    return torch.cat([document_ids(*first_row), second])


DOCUMENTS = [(1, None), (7, None), (8, None), (13, None), (1, (2,)), (1, (1, 1)), (8, (5, 4)), (8, (4, 5)), (13, (14,)),
             (13, (1, 3, 1, 1, 5, 3)), (13, (6, 8)), (12, (1, 4, 4, 4))]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("goes_on", [False, True], ids=["anew", "from a state"])
@pytest.mark.parametrize(("n_tokens", "documents"), DOCUMENTS, ids=str)
@pytest.mark.parametrize("chunk", [1, 4, 256])
def test_chunks_equal_recurrence(
    chunk: int, n_tokens: int, documents: tuple[int, ...] | None, goes_on: bool, dtype: torch.dtype
) -> None:
    q, k, v, state, weight, state_weight = draw(n_tokens, dtype)
    ids_BP = None if documents is None else ids_of(n_tokens, *documents)
    inputs = [q, k, v, *([state] if goes_on else [])]
    results = []
    for compute in (lightning_attention, reference):
        slopes_N = SLOPES_N.to(torch.promote_types(dtype, torch.float32))
        extra = (chunk,) if compute is lightning_attention else ()
        out, last = compute(q, k, v, slopes_N, ids_BP, state if goes_on else None, *extra)
        grads = torch.autograd.grad((out * weight).sum() + (last * state_weight).sum(), inputs, materialize_grads=True)
        results.append([out, last, *grads])
    assert [x.dtype for x in results[0]] == [
        dtype,
        torch.promote_types(dtype, torch.float32),
        *(x.dtype for x in inputs),
    ]
    for name, ours, theirs in zip(["out", "last state", "q", "k", "v", "state"], *results, strict=False):
        if theirs.abs().max() == 0:  # a state that no token sees has no gradient
            assert ours.abs().max() == 0, name
        else:
            assert_close(ours, theirs, dtype, name)


@pytest.mark.parametrize("n_pieces", [1, 2, 3, 16])
def test_chunks_of_several_pieces_are_the_same(n_pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences are worked through some chunks at a time; how many at a time changes nothing."""
    q, k, v, state, weight, state_weight = draw(23)
    ids_BP = ids_of(23, 1, 6, 8, 9)

    def compute() -> list[Tensor]:
        out, last = lightning_attention(q, k, v, SLOPES_N, ids_BP, state, 2)
        return [out, last, *torch.autograd.grad((out * weight).sum() + (last * state_weight).sum(), [q, k, v, state])]

    expected = compute()
    monkeypatch.setattr(kernel, "MAX_PAIRS", 1)
    monkeypatch.setattr(kernel, "MAX_PIECES", n_pieces)
    assert len(list(kernel._pieces(q, 2))) == {1: 1, 2: 2, 3: 3, 16: 11}[n_pieces] + 1
    for ours, theirs in zip(compute(), expected, strict=True):
        assert_close(ours, theirs, torch.float64)


def test_derivatives_are_slopes() -> None:
    q, k, v, state, _, _ = draw(5)
    torch.autograd.gradcheck(
        lambda *x: lightning_attention(*x[:3], SLOPES_N, ids_of(5, 3, 3), x[3], 2), (q, k, v, state), fast_mode=True
    )


def test_a_result_that_nobody_differentiates_costs_no_gradient() -> None:
    """autograd hands on zeros, or nothing, for it."""
    q, k, v, state, _, _ = draw(5)
    out, last = lightning_attention(q, k, v, SLOPES_N, None, state, 2)
    expected_out, expected_last = reference(q, k, v, SLOPES_N, None, state)
    for ours, theirs in ((out, expected_out), (last, expected_last)):
        (grad,) = torch.autograd.grad(ours.square().sum(), [k], retain_graph=True)
        (expected,) = torch.autograd.grad(theirs.square().sum(), [k], retain_graph=True)
        assert_close(grad, expected, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_steps_equal_recurrence(dtype: torch.dtype) -> None:
    q, k, v, state, _, _ = draw(6, dtype)
    expected_out, expected_last = reference(q, k, v, SLOPES_N, None, state)
    outs = []
    for t in range(6):
        out_BNH, state = lightning_attention_step(q[:, t], k[:, t], v[:, t], SLOPES_N, state)
        outs.append(out_BNH)
    assert state.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(torch.stack(outs, dim=1), expected_out, dtype, "outputs")
    # The state never passes through the dtype of the inputs.
    assert_close(state, expected_last, torch.promote_types(dtype, torch.float32), "state")


@pytest.mark.parametrize("n_tokens", [1, 3, 4, 11, 12])
@pytest.mark.parametrize("goes_on", [False, True], ids=["anew", "from a state"])
def test_operations_are_counted_as_they_run(n_tokens: int, goes_on: bool) -> None:
    q, k, v, state, _, _ = draw(n_tokens)
    with FlopCounterMode(display=False) as counter:
        lightning_attention(q, k, v, SLOPES_N, None, state if goes_on else None, 4)
    counted = count_lightning_flops(n_tokens, N_HEADS, WIDTH, 4)
    assert counter.get_total_flops() == N_BATCH * counted
    rest = n_tokens % 4
    assert counted == 4 * N_HEADS * WIDTH * (WIDTH * n_tokens + 4 * (n_tokens - rest) + rest * rest)


def test_memory_grows_with_tokens_and_not_with_their_square() -> None:
    """What is kept for the backward pass: the inputs, and a state for each chunk."""

    def kept_bytes(n_tokens: int) -> int:
        q, k, v, _, _, _ = draw(n_tokens)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            lightning_attention(q, k, v, SLOPES_N, None, None, 4)
        return sum(x.nbytes for x in kept) - SLOPES_N.nbytes

    assert kept_bytes(64) == 2 * kept_bytes(32) == 64 * N_BATCH * N_HEADS * (3 * WIDTH + WIDTH * WIDTH / 4) * 8

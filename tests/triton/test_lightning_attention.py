"""Lightning attention's kernels against the recurrence, at lengths and widths that fill no tile."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hydra.errors import ConfigError
from hydra.kernels.lightning_attention import lightning_attention
from hydra.kernels.reference.lightning_attention import lightning_attention as reference
from hydra.testing.operators import between_nan, inside_nan
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401
from hydra.testing.specs import document_ids, random_activations
from hydra.testing.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("nan_poisoned_memory")

NAMES = ["q", "k", "v", "state"]
# Lengths of documents, the token before the row counted; chunks are of 32 tokens in float32, of 64 in float16. A
# document that ends with a chunk, a state of another document, one that spans chunks, and one of a single token.
PACKED = {
    1: [(1, 1), (2,)],
    33: [(32, 2), (1, 32, 1)],
    65: [(65, 1), (3, 30, 33)],
    100: [(34, 1, 50, 16), (101,)],
}


def build_inputs(n_tokens: int, n_heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    shape = (2, n_tokens, n_heads, width)
    # As after a division by the root of the width: sums of products are then of the size of one.
    q, k, v = (between_nan(random_activations(*shape, dtype=dtype, seed=seed) * width**-0.25) for seed in range(3))
    return [q, k, v, between_nan(random_activations(2, n_heads, width, width, dtype=torch.float32, seed=3))]


def run(
    attention: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], slopes_N: Tensor, ids_BP: Tensor | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    """Both results, and the gradients of all inputs from weights on both."""
    q, k, v, state = inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    results = attention(q, k, v, slopes_N, ids_BP, state)
    weights = [inside_nan(random_activations(*result.shape, dtype=result.dtype, seed=9)) for result in results]
    return results, torch.autograd.grad(results, inputs, weights)


def triton_attention(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    return lightning_attention(*inputs, kernels="triton")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("n_tokens", "n_heads", "width"), [(1, 2, 5), (33, 1, 64), (65, 3, 8), (100, 2, 40)])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_results_and_gradients(packed: bool, n_tokens: int, n_heads: int, width: int, dtype: torch.dtype) -> None:
    inputs = build_inputs(n_tokens, n_heads, width, dtype)
    slopes_N = torch.tensor([0.7, 0.02, 0.0])[:n_heads]
    ids_BP = torch.cat([document_ids(*lengths) for lengths in PACKED[n_tokens]]) if packed else None
    (out, state), grads = run(triton_attention, inputs, slopes_N, ids_BP)
    exact = [tensor.double() for tensor in inputs]
    (expected_out, expected_state), expected_grads = run(reference, exact, slopes_N.double(), ids_BP)
    assert out.dtype == dtype
    assert state.dtype == torch.float32
    assert_close(out, expected_out, dtype, "outputs")
    assert_close(state, expected_state, dtype, "state")
    for name, grad, expected, tensor in zip(NAMES, grads, expected_grads, inputs, strict=True):
        assert grad.dtype == tensor.dtype, (name, grad.dtype)
        assert_close(grad, expected, dtype, f"gradient of {name}")


def test_a_row_in_pieces_is_the_row() -> None:
    q, k, v, state = build_inputs(70, 2, 16, torch.float32)
    slopes_N = torch.tensor([0.1, 0.01])
    ids_BP = torch.cat([document_ids(41, 30), document_ids(71)])
    expected_out, expected_state = triton_attention(q, k, v, slopes_N, ids_BP, state)
    outs = []
    for start, stop in [(0, 1), (1, 40), (40, 70)]:
        pieces = [x[:, start:stop] for x in (q, k, v)]
        out, state = triton_attention(*pieces, slopes_N, ids_BP[:, start : stop + 1], state)
        outs.append(out)
    assert_close(torch.cat(outs, dim=1), expected_out, torch.float32, "outputs")
    assert_close(state, expected_state, torch.float32, "state")


def test_strong_decay_over_a_chunk_neither_overflows_nor_leaves_nan() -> None:
    """exp(slope * distance) of a later token would be infinite."""
    q, k, v, state = build_inputs(40, 1, 16, torch.float32)
    slopes_N = torch.tensor([50.0])
    results, grads = run(triton_attention, [q, k, v, state], slopes_N, None)
    assert all(tensor.isfinite().all() for tensor in (*results, *grads))
    assert_close(results[0], (q * k).sum(-1, keepdim=True) * v, torch.float32, "outputs")


def test_compiled_whole_with_every_gradient() -> None:
    inputs = build_inputs(40, 2, 16, torch.float32)
    slopes_N, ids_BP = torch.tensor([0.1, 0.01]), document_ids(20, 21).expand(2, -1)
    compiled = torch.compile(triton_attention, fullgraph=True, backend="aot_eager")
    results, grads = run(compiled, inputs, slopes_N, ids_BP)
    expected, expected_grads = run(triton_attention, inputs, slopes_N, ids_BP)
    for actual, wanted in zip((*results, *grads), (*expected, *expected_grads), strict=True):
        assert actual.equal(wanted)


def test_the_operator_keeps_torchs_rules() -> None:
    q, k, v, state = (tensor.requires_grad_() for tensor in build_inputs(5, 2, 8, torch.float32))
    arguments = (q, k, v, torch.tensor([0.1, 0.01]), document_ids(3, 3).repeat(2, 1), state)
    torch.library.opcheck(torch.ops.hydra.lightning_attention.default, arguments)


def test_what_the_kernels_cannot_take_is_refused() -> None:
    x = torch.ones(1, 2, 1, 4, dtype=torch.float64)
    with pytest.raises(ConfigError, match="float64"):
        triton_attention(x, x, x, torch.ones(1))
    wide = torch.ones(1, 2, 1, 300)
    with pytest.raises(ConfigError, match="256"):
        triton_attention(wide, wide, wide, torch.ones(1))

"""The convolution pair's kernels against one document at a time, at lengths and widths that fill no tile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hydra.attention import build_attention
from hydra.errors import ConfigError
from hydra.kernels.cca_convolution import cca_convolution
from hydra.kernels.reference.cca_convolution import cca_convolution as reference
from hydra.testing.operators import CountedOperators, between_nan, inside_nan
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401
from hydra.testing.specs import document_ids, random_activations
from hydra.testing.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("nan_poisoned_memory")

NAMES = ["u", "past u", "weight 0", "bias 0", "weight 1", "bias 1"]
# Query heads, key/value heads, width, taps: a group, one head each, a width beyond a block, longer and no convolutions.
SHAPES = {
    "ccgqa": (4, 2, 6, 2, 2),
    "cca": (1, 1, 16, 3, 2),
    "wide": (2, 1, 40, 2, 2),
    "long": (3, 1, 5, 2, 4),
    "short": (2, 2, 8, 1, 1),
}


def build_inputs(shape: str, n_tokens: int, has_past: bool, dtype: torch.dtype) -> list[Tensor | None]:
    n_query_heads, n_kv_heads, width, n_taps_0, n_taps_1 = SHAPES[shape]
    n_channels, n_before = (n_query_heads + n_kv_heads) * width, n_taps_0 + n_taps_1 - 2

    def draw(*sizes: int, seed: int, scale: float = 1.0) -> Tensor:
        return between_nan(random_activations(*sizes, dtype=dtype, seed=seed) * scale)

    past = draw(2, n_before, n_channels, seed=1) if has_past else None
    weight_1 = draw(n_channels, width, n_taps_1, seed=4, scale=width**-0.5)
    biases = [draw(n_channels, seed=seed, scale=0.3) for seed in (3, 5)]
    return [draw(2, n_tokens, n_channels, seed=0), past, draw(n_channels, 1, n_taps_0, seed=2), biases[0], weight_1,
            biases[1]]  # fmt: skip


def run(
    convolution: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor | None], n_kv_heads: int,
    ids_BP: Tensor | None,
) -> tuple[tuple[Tensor, Tensor], list[Tensor | None]]:  # fmt: skip
    """Queries and keys, and the gradients of all inputs from weights on both."""
    inputs = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    results = convolution(*inputs, n_kv_heads, ids_BP)
    weights = [inside_nan(random_activations(*result.shape, dtype=result.dtype, seed=9)) for result in results]
    grads = iter(torch.autograd.grad(results, [tensor for tensor in inputs if tensor is not None], weights))
    return results, [None if tensor is None else next(grads) for tensor in inputs]


def triton_convolution(*inputs: Any) -> tuple[Tensor, Tensor]:
    return cca_convolution(*inputs, kernels="triton")


def check(shape: str, lengths: tuple[int, ...], has_past: bool, dtype: torch.dtype) -> None:
    """lengths: of the documents of the first row, places before it counted; the second row is one document."""
    n_kv_heads, n_before = SHAPES[shape][1], sum(SHAPES[shape][3:]) - 2
    n_tokens = sum(lengths) - n_before
    ids_BP = None if len(lengths) == 1 else torch.cat([document_ids(*lengths), document_ids(sum(lengths))])
    inputs = build_inputs(shape, n_tokens, has_past, dtype)
    results, grads = run(triton_convolution, inputs, n_kv_heads, ids_BP)
    exact = [None if tensor is None else tensor.double() for tensor in inputs]
    expected, expected_grads = run(reference, exact, n_kv_heads, ids_BP)
    for name, actual, wanted in zip(["q", "k"], results, expected, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, wanted, dtype, name)
    for name, grad, wanted in zip(NAMES, grads, expected_grads, strict=True):
        if grad is not None and wanted is not None and grad.numel() > 0:
            assert grad.dtype == dtype, name
            assert_close(grad, wanted, dtype, f"gradient of {name}")


@pytest.mark.parametrize(
    ("shape", "has_past"),
    [("ccgqa", True), ("cca", False), ("wide", False), ("long", True), ("long", False), ("short", True)],
)
def test_results_and_gradients(shape: str, has_past: bool) -> None:
    """Documents that end in the past, with a tile, and after one token."""
    n_before = sum(SHAPES[shape][3:]) - 2
    # Without tokens before a row, its first document reaches back over them.
    first = n_before - 1 if has_past and n_before else n_before + 3
    check(shape, (first, 32 - first + n_before, 1, 4), has_past, torch.float32)


def test_float16() -> None:
    check("ccgqa", (30, 41), True, torch.float16)


@pytest.mark.parametrize("has_past", [False, True], ids=["from zeros", "from a past"])
@pytest.mark.parametrize("n_tokens", [1, 2])
def test_one_document_also_shorter_than_the_convolutions(n_tokens: int, has_past: bool) -> None:
    check("long", (n_tokens + 4,), has_past, torch.float32)


def test_a_row_in_pieces_is_the_row() -> None:
    inputs = build_inputs("long", 9, False, torch.float32)
    u_BTC, _, *parameters = inputs
    assert u_BTC is not None
    expected = triton_convolution(u_BTC, None, *parameters, 1, None)
    past = u_BTC.new_zeros(2, 4, u_BTC.shape[2])
    pieces = []
    for piece in u_BTC.split([1, 2, 6], dim=1):
        pieces.append(triton_convolution(piece, past, *parameters, 1, None))
        past = torch.cat([past, piece], dim=1)[:, -4:]
    for actual, wanted in zip(zip(*pieces, strict=True), expected, strict=True):
        assert_close(torch.cat(actual, dim=1), wanted, torch.float32)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_dispatch_serves_the_layer(kernels: str) -> None:
    layer = build_attention("ccgqa", d_model=32, n_heads=8, n_query_heads=4, n_kv_heads=2, kernels=kernels)
    x_BTD, ids_BT = random_activations(2, 9, 32, dtype=torch.float32), document_ids(4, 5).expand(2, -1)
    with CountedOperators() as operators:
        layer(x_BTD, document_ids_BT=ids_BT).sum().backward()
    n_calls = int(kernels == "triton")
    assert operators.counts["cca_convolution"] == operators.counts["cca_convolution_backward"] == n_calls


def test_compiled_whole_with_every_gradient() -> None:
    inputs, ids_BP = build_inputs("ccgqa", 7, True, torch.float32), document_ids(5, 4).expand(2, -1)
    compiled = torch.compile(triton_convolution, fullgraph=True, backend="aot_eager")
    results, grads = run(compiled, inputs, 2, ids_BP)
    expected, expected_grads = run(triton_convolution, inputs, 2, ids_BP)
    for actual, wanted in zip((*results, *grads), (*expected, *expected_grads), strict=True):
        assert actual is not None and wanted is not None
        assert actual.equal(wanted)


def test_the_operator_keeps_torchs_rules() -> None:
    u, _, *parameters = (
        None if x is None else x.requires_grad_() for x in build_inputs("ccgqa", 3, False, torch.float32)
    )
    arguments = (u, *parameters, document_ids(3, 2).repeat(2, 1), 3, 2)
    torch.library.opcheck(torch.ops.hydra.cca_convolution.default, arguments)


def test_what_the_kernels_cannot_take_is_refused() -> None:
    inputs = [None if x is None else x.double() for x in build_inputs("short", 2, False, torch.float32)]
    with pytest.raises(ConfigError, match="float64"):
        triton_convolution(*inputs, 2, None)
    wide = [
        torch.ones(1, 2, 600),
        None,
        torch.ones(600, 1, 1),
        torch.ones(600),
        torch.ones(600, 300, 1),
        torch.ones(600),
    ]
    with pytest.raises(ConfigError, match="256"):
        triton_convolution(*wide, 1, None)

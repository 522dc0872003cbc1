"""lightning against its reference: outputs, every gradient, cached state, at odd lengths, in NaN-poisoned memory."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hydra.attention.backends.lightning.attention import LightningAttention, LightningCache
from hydra.attention.backends.lightning.reference import compute_reference
from hydra.attention.masks import build_context
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401
from hydra.testing.specs import build_random_layer, document_ids, random_activations
from hydra.testing.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("nan_poisoned_memory")


def build(gate_rank: int = 0, dtype: torch.dtype = torch.float64, layer_index: int = 2) -> LightningAttention:
    layer = build_random_layer("lightning", 24, 4, dtype, gate_rank=gate_rank, layer_index=layer_index, n_layers=5)
    assert isinstance(layer, LightningAttention)
    return layer


def reference_of(layer: LightningAttention, x_BTD: Tensor, ids_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    result = compute_reference(dict(layer.named_parameters()), layer.spec, x_BTD, ids_BT)
    return result.out_BTD, result.state_BNHH


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gate_rank", [0, 3])
@pytest.mark.parametrize("lengths", [(1,), (7,), (13,), (5, 1, 7)], ids=str)
@pytest.mark.parametrize("layer_index", [0, 4])
def test_layer_equals_reference(layer_index: int, lengths: tuple[int, ...], gate_rank: int, dtype: torch.dtype) -> None:
    layer = build(gate_rank, dtype, layer_index)
    ids_BT = document_ids(*lengths).expand(2, -1) if len(lengths) > 1 else None
    x_BTD = random_activations(2, sum(lengths), 24, dtype=dtype).requires_grad_()
    weight_BTD = random_activations(2, sum(lengths), 24, dtype=dtype, seed=1)
    inputs = [x_BTD, *layer.parameters()]

    out_BTD = layer(x_BTD, document_ids_BT=ids_BT)
    grads = torch.autograd.grad((out_BTD * weight_BTD).sum(), inputs)
    expected_BTD, _ = reference_of(layer, x_BTD, ids_BT)
    expected_grads = torch.autograd.grad((expected_BTD * weight_BTD).sum(), inputs)

    assert_close(out_BTD, expected_BTD, dtype, "outputs")
    names = ["x", *(name for name, _ in layer.named_parameters())]
    for name, grad, expected in zip(names, grads, expected_grads, strict=True):
        assert_close(grad, expected, dtype, name)


def test_layer_equals_reference_over_more_than_one_chunk() -> None:
    """Two whole chunks of 256 and a rest, a document that ends inside of the second and one of the rest alone."""
    layer, x_BTD = build(), random_activations(1, 530, 24)
    ids_BT = document_ids(300, 225, 5)
    expected_BTD, expected_BNHH = reference_of(layer, x_BTD, ids_BT)
    cache = layer.new_cache(1, 530)
    assert_close(layer(x_BTD, document_ids_BT=ids_BT), expected_BTD, torch.float64, "outputs")
    assert_close(layer(x_BTD, document_ids_BT=ids_BT, cache=cache), expected_BTD, torch.float64, "outputs")
    assert_close(cache.state_BNHH, expected_BNHH, torch.float64, "state")


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("split", [(11,), (1,) * 11, (4, 7), (5, 6), (6, 1, 4), (3, 1, 1, 6)], ids=str)
def test_state_of_a_cache_equals_reference(split: tuple[int, ...], packed: bool) -> None:
    """After every call, and at boundaries of documents that fall between calls, at their first and their last token."""
    layer, x_BTD = build(), random_activations(2, 11, 24)
    ids_BT = torch.cat([document_ids(4, 1, 6), document_ids(6, 5)]) if packed else None
    cache = layer.new_cache(2, 11)
    memory, start = cache.state_BNHH.data_ptr(), 0
    for length in split:
        stop = start + length
        ids = None if ids_BT is None else ids_BT[:, start:stop]
        out_BTD = layer(x_BTD[:, start:stop], document_ids_BT=ids, cache=cache)
        expected_BTD, expected_BNHH = reference_of(layer, x_BTD[:, :stop], None if ids_BT is None else ids_BT[:, :stop])
        assert_close(out_BTD, expected_BTD[:, start:], torch.float64, "outputs")
        assert_close(cache.state_BNHH, expected_BNHH, torch.float64, "state")
        assert cache.state_BNHH.data_ptr() == memory, "a decoder that was compiled reads this memory"
        start = stop


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 4])
def test_state_is_not_rounded_to_the_dtype_of_the_parameters(length: int, dtype: torch.dtype) -> None:
    layer = build(dtype=dtype)
    cache = layer.new_cache(2, 12)
    x_BTD = random_activations(2, 12, 24, dtype=dtype)
    for start in range(0, 12, length):
        layer(x_BTD[:, start : start + length], cache=cache)
    assert cache.state_BNHH.dtype == torch.float32
    assert (cache.state_BNHH.bfloat16().float() - cache.state_BNHH).abs().max() > 0
    _, expected_BNHH = reference_of(layer, x_BTD)
    assert_close(cache.state_BNHH, expected_BNHH, dtype, "state")


@torch.no_grad()
def test_a_row_of_a_cache_is_its_memory_and_clearing_forgets() -> None:
    """As a Decoder fills the rows of its cache from prompts of different lengths."""
    layer, x_BTD = build(), random_activations(2, 9, 24)
    cache = layer.new_cache(2, 9)
    for row, length in enumerate((3, 7)):
        layer(x_BTD[row : row + 1, :length], cache=cache.row(row))
        _, expected_BNHH = reference_of(layer, x_BTD[row : row + 1, :length])
        assert_close(cache.state_BNHH[row : row + 1], expected_BNHH, torch.float64, "state")
    cache.clear()
    assert isinstance(cache, LightningCache)
    assert (cache.state_BNHH == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("split", [(9,), (4, 5), (3, 1, 5), (2, 1, 1, 5)], ids=str)
def test_left_padding_as_a_document_of_its_own_changes_nothing(split: tuple[int, ...]) -> None:
    layer, x_BTD = build(), random_activations(2, 9, 24)
    n_pads = (3, 0)
    ids_BT = torch.tensor([[-1] * n + [0] * (9 - n) for n in n_pads])
    cache, pieces, start = layer.new_cache(2, 9), [], 0
    for length in split:
        part = slice(start, start + length)
        pieces.append(layer(x_BTD[:, part], document_ids_BT=ids_BT[:, part], cache=cache))
        start += length
    out_BTD = torch.cat(pieces, dim=1)
    for row, n in enumerate(n_pads):
        expected_BTD, expected_BNHH = reference_of(layer, x_BTD[row : row + 1, n:])
        assert_close(out_BTD[row : row + 1, n:], expected_BTD, torch.float64, "outputs")
        assert_close(cache.state_BNHH[row : row + 1], expected_BNHH, torch.float64, "state")


def test_layers_are_compiled_once() -> None:
    """One graph, forward and backward: the decay of a layer is data to compiled code."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layers = [build(dtype=torch.float32, layer_index=index) for index in range(3)]
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=False, backend=counter)
    x_BTD = random_activations(1, 9, 24, dtype=torch.float32).requires_grad_()
    for layer in layers:
        context = layer.prepare(build_context(x_BTD, document_ids_BT=document_ids(4, 5)))
        results = []
        for out_BTD in (layer(x_BTD, context), layer.forward(x_BTD, context)):
            results.append([out_BTD, *torch.autograd.grad(out_BTD.square().sum(), [x_BTD, *layer.parameters()])])
        for ours, theirs in zip(*results, strict=True):
            assert_close(ours, theirs, torch.float32)
    assert counter.frame_count == 1

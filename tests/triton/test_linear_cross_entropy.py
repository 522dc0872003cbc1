"""Linear cross-entropy's kernel against all logits at once, in one chunk and several."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hydra.errors import ConfigError
from hydra.kernels._triton import linear_cross_entropy as triton_kernels
from hydra.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy
from hydra.kernels.reference.linear_cross_entropy import linear_cross_entropy as reference
from hydra.model.framework import Execution
from hydra.testing.operators import CountedOperators, inside_nan
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401
from hydra.testing.specs import build_random_model, random_activations
from hydra.testing.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("nan_poisoned_memory")


def triton_loss(x_XD: Tensor, weight_VD: Tensor, targets_X: Tensor) -> Tensor:
    return linear_cross_entropy(x_XD, weight_VD, targets_X, kernels="triton")


def build_inputs(n_tokens: int, width: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x_XD = inside_nan(random_activations(n_tokens, width, dtype=dtype))
    weight_VD = inside_nan(random_activations(vocab_size, width, dtype=dtype, seed=1))
    generator = torch.Generator().manual_seed(2)
    targets_X = torch.randint(vocab_size, (n_tokens, 2), generator=generator)[:, 0]
    targets_X[::3] = IGNORE_INDEX
    return x_XD, weight_VD, targets_X


def run(
    loss: Callable[..., Tensor], x_XD: Tensor, weight_VD: Tensor, targets_X: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [tensor.detach().requires_grad_() for tensor in (x_XD, weight_VD)]
    value = loss(*leaves, targets_X)
    return value, torch.autograd.grad(0.3 * value, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("n_tokens", "width", "vocab_size"), [(1, 3, 2), (7, 12, 61), (19, 5, 4099)])
@pytest.mark.parametrize("chunk", [None, 4])
def test_loss_and_gradients(
    chunk: int | None, n_tokens: int, width: int, vocab_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk is not None:
        monkeypatch.setattr(triton_kernels, "chunk_length", lambda vocab_size: chunk)
    x_XD, weight_VD, targets_X = build_inputs(n_tokens, width, vocab_size, dtype)
    if n_tokens == 1:
        targets_X[0] = 1
    loss, grads = run(triton_loss, x_XD, weight_VD, targets_X)
    expected, expected_grads = run(reference, x_XD.double(), weight_VD.double(), targets_X)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, dtype, "loss")
    for name, grad, wanted in zip(["x", "weight"], grads, expected_grads, strict=True):
        assert grad.dtype == dtype, name
        assert_close(grad, wanted, dtype, f"gradient of {name}")


def test_nothing_to_predict() -> None:
    x_XD, weight_VD, targets_X = build_inputs(5, 4, 9, torch.float32)
    for n_tokens in (0, 5):
        loss, grads = run(triton_loss, x_XD[:n_tokens], weight_VD, torch.full_like(targets_X, IGNORE_INDEX)[:n_tokens])
        assert loss == 0
        assert all((grad == 0).all() for grad in grads)


def test_large_logits_neither_overflow_nor_leave_nan() -> None:
    x_XD = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    weight_VD = torch.tensor([[3e4], [0.0], [-3e4]], requires_grad=True)
    loss, grads = run(triton_loss, x_XD, weight_VD, torch.tensor([0, 0]))
    assert loss == 6e4
    assert all(grad.isfinite().all() for grad in grads)


def test_a_logit_that_is_nan_shows_in_the_loss() -> None:
    x_XD, weight_VD, targets_X = build_inputs(3, 4, 9, torch.float32)
    targets_X[:] = 0
    weight_VD[5] = torch.nan
    assert triton_loss(x_XD, weight_VD, targets_X).isnan()


def test_without_gradients_none_are_computed() -> None:
    x_XD, weight_VD, targets_X = build_inputs(7, 12, 61, torch.float32)
    loss = triton_loss(x_XD.requires_grad_(), weight_VD, targets_X)
    with torch.no_grad():
        assert triton_loss(x_XD, weight_VD, targets_X).equal(loss.detach())
        _, *grads = triton_kernels.linear_cross_entropy_op(x_XD, weight_VD, targets_X, IGNORE_INDEX, False)
    assert [grad.numel() for grad in grads] == [0, 0]


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_dispatch_serves_the_models_loss(kernels: str) -> None:
    model = build_random_model(torch.float32)
    # Its own kernels are not what is tested here.
    model.execution = Execution(kernels=kernels)
    inputs_BT = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    with CountedOperators() as operators:
        output = model(inputs_BT, inputs_BT.roll(-1, dims=1))
        output.losses["cross_entropy"].backward()
    assert operators.counts["linear_cross_entropy"] == int(kernels == "triton")


def test_compiled_whole_with_every_gradient() -> None:
    inputs = build_inputs(7, 12, 61, torch.float32)
    loss, grads = run(torch.compile(triton_loss, fullgraph=True, backend="aot_eager"), *inputs)
    expected, expected_grads = run(triton_loss, *inputs)
    assert loss.equal(expected)
    assert all(grad.equal(wanted) for grad, wanted in zip(grads, expected_grads, strict=True))


def test_the_operator_keeps_torchs_rules() -> None:
    x_XD, weight_VD, targets_X = build_inputs(7, 12, 61, torch.float32)
    arguments = (x_XD.requires_grad_(), weight_VD.requires_grad_(), targets_X, IGNORE_INDEX, True)
    torch.library.opcheck(torch.ops.hydra.linear_cross_entropy.default, arguments)


def test_what_the_kernels_cannot_take_is_refused() -> None:
    x_XD, weight_VD, targets_X = build_inputs(3, 4, 9, torch.float64)
    with pytest.raises(ConfigError, match="float64"):
        triton_loss(x_XD, weight_VD, targets_X)

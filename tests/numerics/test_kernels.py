"""Fast operators against their slow references: outputs and every gradient, at odd lengths, in NaN-poisoned memory."""

import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hydra.attention.core import KERNELS, ONLY_ON_GPU, check_kernel, choose_kernel, softmax_attention
from hydra.attention.masks import AttentionContext, TokenHistory, build_context, interval_mask, to_additive
from hydra.errors import ConfigError
from hydra.kernels.blocked_attention import MAX_BLOCKS, QUERY_BLOCK, blocked_attention
from hydra.kernels.linear_cross_entropy import IGNORE_INDEX, MAX_LOGITS, chunk_length, linear_cross_entropy
from hydra.kernels.reference import linear_cross_entropy as reference
from hydra.kernels.reference.blocked_attention import blocked_attention as blocked_attention_reference
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401
from hydra.testing.specs import document_ids, random_activations
from hydra.testing.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("nan_poisoned_memory")
LONG = QUERY_BLOCK * MAX_BLOCKS + 3
"""More than so many blocks of the usual length."""
CPU_KERNELS = [kernel for kernel in KERNELS if kernel not in ONLY_ON_GPU]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def slow_attention(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask_B1TS: Tensor) -> Tensor:
    q_BKGTH = q_BNTH.unflatten(1, (k_BKSH.shape[1], -1))
    return blocked_attention_reference(q_BKGTH, k_BKSH, v_BKSH, mask_B1TS).flatten(1, 2)


def context_of(n_queries: int, n_keys: int, dtype: torch.dtype, kernel: str, hidden: str) -> AttentionContext:
    """Of two rows, in which documents, a window, both or nothing hide keys."""
    tokens_BSD, history = torch.zeros(2, n_keys, 1), TokenHistory(2, n_keys)
    ids_BS = torch.cat([document_ids(n_keys - n_keys // n, n_keys // n) for n in (3, 2)])
    ids_BS = ids_BS if "documents" in hidden else None
    for start, stop in ((0, n_keys - n_queries), (n_keys - n_queries, n_keys)):
        ids_BT = None if ids_BS is None else ids_BS[:, start:stop]
        if start < stop:
            context = build_context(tokens_BSD[:, start:stop], document_ids_BT=ids_BT, history=history, kernel=kernel)
    return context.specialise(dtype, window=max(1, n_keys // 3) if "window" in hidden else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("n_queries", "n_keys"),
    [
        (1, 1),
        (1, 9),
        (5, 5),
        (3, 8),
        (QUERY_BLOCK, QUERY_BLOCK),
        (QUERY_BLOCK + 1, QUERY_BLOCK + 1),
        (70, 150),
        (LONG, LONG),
    ],
)
@pytest.mark.parametrize("hidden", ["nothing", "documents", "window", "documents and window"])
@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_attention_kernels(
    kernel: str, hidden: str, n_queries: int, n_keys: int, n_kv_heads: int, dtype: torch.dtype
) -> None:
    q = random_activations(2, 4, n_queries, 6, dtype=dtype)
    k = random_activations(2, n_kv_heads, n_keys, 6, dtype=dtype, seed=1)
    v = random_activations(2, n_kv_heads, n_keys, 10, dtype=dtype, seed=2)  # values may be wider
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    context = context_of(n_queries, n_keys, dtype, kernel, hidden)
    first_BT = context.first_visible_BT
    assert (first_BT is None) == (hidden == "nothing" or (hidden == "window" and n_keys == 1))
    first_BT = torch.zeros(1, n_queries, dtype=torch.int64) if first_BT is None else first_BT
    is_visible_BTS = interval_mask(first_BT, n_keys - n_queries)
    weight = random_activations(2, 4, n_queries, 10, dtype=dtype, seed=3)

    out = softmax_attention(*inputs, context)
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    expected = slow_attention(*inputs, to_additive(is_visible_BTS, torch.float64)[:, None])
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)

    assert out.dtype == dtype
    assert_close(out, expected, dtype, "outputs")
    for name, grad, expected_grad in zip("qkv", grads, expected_grads, strict=True):
        if (is_visible_BTS.sum(-1) == 1).all() and name in "qk":
            assert grad.abs().max() < 1e-5  # one key gets all the weight, whatever its score
        elif dtype == torch.bfloat16 and n_queries == 1:
            assert grad.isfinite().all()  # a norm over so few rounded numbers says little
        else:
            assert_close(grad, expected_grad, dtype, name)


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_a_scale_of_ones_own(kernel: str) -> None:
    q, k, v = (random_activations(1, 2, 5, 4, seed=seed) for seed in range(3))
    context = build_context(q[:, 0], kernel=kernel).specialise(torch.float64)
    out = softmax_attention(q, k, v, context, scale=1.0)
    assert_close(out, softmax_attention(q * 2, k, v, context), torch.float64, "outputs")


def test_flex_attention_sees_the_same() -> None:
    """Forward as torch computes it uncompiled; on a CPU it has no backward pass."""
    q, k, v = (random_activations(2, 4, 150, 16, dtype=torch.float32, seed=seed) for seed in range(3))
    for hidden in ("nothing", "documents", "window", "documents and window"):
        for n_queries in (150, 70):
            flex, plain = (
                softmax_attention(q[:, :, -n_queries:], k, v, context_of(n_queries, 150, torch.float32, kernel, hidden))
                for kernel in ("flex", "scaled_dot_product")
            )
            assert_close(flex, plain, torch.float32, hidden)


@pytest.mark.parametrize("value_width", [10, 16, 24])
@pytest.mark.parametrize("hidden", ["nothing", "documents"])
def test_flash_attention_is_given_one_width(hidden: str, value_width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in of the package's two functions in plain torch, which takes what the package takes."""

    def attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window_size: tuple) -> Tensor:
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        assert (causal, window_size) == (True, (-1, -1))
        mask_11TS = to_additive(interval_mask(torch.zeros(1, q.shape[1]), 0), torch.float64)[:, None]
        q = q * softmax_scale * q.shape[-1] ** 0.5
        return slow_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask_11TS).transpose(1, 2)

    def attend_packed(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *others: Any, **how: Any) -> Tensor:
        parts = [attend(*(x[None, start:stop] for x in (q, k, v)), **how)[0] for start, stop in pairwise(starts)]
        return torch.cat(parts)

    stand_in = SimpleNamespace(flash_attn_func=attend, flash_attn_varlen_func=attend_packed)
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    q, k = (random_activations(2, heads, 23, 16, seed=heads) for heads in (4, 2))
    v = random_activations(2, 2, 23, value_width, seed=3)
    flash, plain = (
        softmax_attention(q, k, v, context_of(23, 23, torch.float64, kernel, hidden))
        for kernel in ("flash", "scaled_dot_product")
    )
    assert_close(flash, plain, torch.float64, "outputs")


@pytest.mark.parametrize("kernel", ["scaled_dot_product", "blocked"])
def test_a_row_that_sees_nothing_gives_zeros_and_no_gradient(kernel: str) -> None:
    inputs = [random_activations(1, 2, 5, 4, seed=seed).requires_grad_() for seed in range(3)]
    is_visible = torch.ones(5, 5, dtype=torch.bool).tril()
    is_visible[2] = False
    mask_B1TS = to_additive(is_visible, torch.float64)[None, None]
    out = softmax_attention(*inputs, AttentionContext(0, torch.arange(5)[None], None, kernel, mask_B1TS=mask_B1TS))
    assert out[:, :, 2].abs().max() == 0
    grads = torch.autograd.grad(out.square().sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[0][:, :, 2].abs().max() == 0


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocked_attention_of_rows_that_see_nothing(dtype: torch.dtype, is_compiled: bool) -> None:
    """Three blocks of queries, the second of which sees nothing in one row, and two query heads for each key head."""
    torch.compiler.reset()
    length = 2 * QUERY_BLOCK + 5
    q = random_activations(2, 3, 2, length, 8, dtype=dtype)
    k, v = (random_activations(2, 3, length, 8, dtype=dtype, seed=seed) for seed in (1, 2))
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    is_visible_BTS = torch.ones(2, length, length, dtype=torch.bool).tril()
    is_visible_BTS[1, QUERY_BLOCK : 2 * QUERY_BLOCK] = False
    mask_B1TS = to_additive(is_visible_BTS, dtype)[:, None]
    weight = random_activations(2, 3, 2, length, 8, dtype=dtype, seed=3)

    fast = torch.compile(blocked_attention, fullgraph=True, dynamic=False) if is_compiled else blocked_attention
    out, expected = fast(*inputs, mask_B1TS), blocked_attention_reference(*inputs, mask_B1TS)
    grads, expected_grads = (torch.autograd.grad((o * weight).sum(), inputs) for o in (out, expected))
    assert (out[1, :, :, QUERY_BLOCK : 2 * QUERY_BLOCK] == 0).all()
    assert_close(out, expected, dtype, "outputs")
    for name, grad, expected_grad in zip("qkv", grads, expected_grads, strict=True):
        assert_close(grad, expected_grad, dtype, name)


def test_blocked_attention_refuses_a_second_derivative() -> None:
    inputs = [random_activations(1, 1, 1, 3, 4).requires_grad_()]
    inputs += [random_activations(1, 1, 3, 4, seed=seed).requires_grad_() for seed in (1, 2)]
    out = blocked_attention(*inputs, torch.zeros(1, 1, 3, 3, dtype=torch.float64))
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("fast", "cpu"), "must be one of .*blocked.* but got 'fast'"),
        (("flex", "cpu"), "backward pass on a GPU only, and the device is cpu; use attention_kernel auto"),
        (("tiled", "cuda"), "on a CPU only, and the device is cuda"),
        (("flash", "cpu"), "on a GPU only, and the device is cpu"),
        (("flash", "cuda"), "flash-attn is not installed"),
    ],
)
def test_a_kernel_that_cannot_train_here_says_why(arguments: tuple[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_kernel(*arguments)
    check_kernel("blocked", "cpu")
    check_kernel("flex", "cuda")


def test_auto_takes_the_kernel_for_the_device() -> None:
    assert choose_kernel("cpu", 256)[0] == "blocked"
    assert choose_kernel("cpu", 100_000)[0] == "tiled"
    assert choose_kernel("cuda", 256)[0] == "scaled_dot_product"


@pytest.fixture
def fresh_compiler() -> None:
    """Shapes compiled by other tests do not count towards the limit of a function's compiled forms."""
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("chunks", [0.4, 1.0, 2.3])
def test_linear_cross_entropy(chunks: float, is_compiled: bool, dtype: torch.dtype) -> None:
    """One chunk, exactly one, and several with a ragged end; some targets are to be left out."""
    n_vocab = MAX_LOGITS // 256
    n_tokens = int(chunks * chunk_length(n_vocab))
    x_XD = random_activations(n_tokens, 16, dtype=dtype).requires_grad_()
    weight_VD = random_activations(n_vocab, 16, dtype=dtype, seed=1).requires_grad_()
    targets_X = torch.randint(n_vocab, (n_tokens,), generator=torch.Generator().manual_seed(2))
    targets_X[3:20] = IGNORE_INDEX

    loss = linear_cross_entropy(x_XD, weight_VD, targets_X, is_compiled)
    grads = torch.autograd.grad(0.01 * loss, [x_XD, weight_VD])
    exact = [tensor.detach().double().requires_grad_() for tensor in (x_XD, weight_VD)]
    expected = reference.linear_cross_entropy(*exact, targets_X)
    expected_grads = torch.autograd.grad(0.01 * expected, exact)

    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(loss, expected, dtype, "loss")
    for name, grad, expected_grad in zip(("x", "weight"), grads, expected_grads, strict=True):
        assert_close(grad, expected_grad, dtype, name)
    assert grads[0][3:20].abs().max() == 0
    with torch.no_grad():
        assert_close(linear_cross_entropy(x_XD, weight_VD, targets_X, is_compiled), expected, dtype, "loss alone")


def test_linear_cross_entropy_never_holds_all_logits() -> None:
    """Peak of what is allocated while it runs, against the size of the logits in their own dtype."""
    n_tokens, n_vocab = 4096, 8192
    x_XD = random_activations(n_tokens, 16, dtype=torch.bfloat16).requires_grad_()
    weight_VD = random_activations(n_vocab, 16, dtype=torch.bfloat16, seed=1).requires_grad_()
    targets_X = torch.randint(n_vocab, (n_tokens,))
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        linear_cross_entropy(x_XD, weight_VD, targets_X).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 2 * 4 * chunk_length(n_vocab) * n_vocab < 2 * n_tokens * n_vocab


def test_linear_cross_entropy_of_nothing_is_zero() -> None:
    x_XD, weight_VD = random_activations(5, 4).requires_grad_(), random_activations(7, 4).requires_grad_()
    loss = linear_cross_entropy(x_XD, weight_VD, torch.full((5,), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0.0
    assert x_XD.grad is not None
    assert x_XD.grad.abs().max() == 0


def test_the_scale_of_a_loss_is_not_rounded() -> None:
    """1 / tokens is mostly no number that bfloat16 has; rounding it would scale every gradient of a step alike."""
    x = random_activations(5, 8, dtype=torch.bfloat16).requires_grad_()
    weight = random_activations(11, 8, dtype=torch.bfloat16, seed=1)
    targets = torch.arange(5)
    (whole,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), x)
    (third,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets) / 3, x)
    assert torch.equal(third, (whole.float() * torch.tensor(1 / 3)).bfloat16())

"""Tiled attention, in C++ and in plain torch, against float64: odd lengths, windows, documents, caches, wide values.

B batch, T queries, S keys, K key/value heads, G query heads of each, H width of queries and keys, E width of values.
"""

import ctypes
import mmap
import os
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hydra.errors import ConfigError
from hydra.kernels import tiled_attention as module
from hydra.kernels.reference.tiled_attention import tiled_attention as reference
from hydra.kernels.tiled_attention import AMX, FLOAT32, PAIRS, TILE, native_products, tiled_attention
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401
from hydra.testing.specs import random_activations
from hydra.testing.tolerances import assert_close

M_PERTURB, M_MMAP_THRESHOLD = -6, -3
FILL_WITH_FF = 0x100
"""Memory is filled with the complement of the lowest byte: float32 and bfloat16 NaN."""
IMPLEMENTATIONS = [
    (torch.float64, None),
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float32, FLOAT32),
    (torch.bfloat16, FLOAT32),
    (torch.bfloat16, PAIRS),
    (torch.bfloat16, AMX),
]


@pytest.fixture(autouse=True)
def poisoned(nan_poisoned_memory: None) -> Iterator[None]:  # noqa: F811
    """What the C++ code takes for itself is NaN too, where the C library can do that."""
    libc = ctypes.CDLL(None)
    can_perturb = hasattr(libc, "gnu_get_libc_version")
    if can_perturb:
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_PERTURB, FILL_WITH_FF)
    yield
    if can_perturb:
        libc.mallopt(M_PERTURB, 0)


def name_of(implementation: tuple[torch.dtype, int | None]) -> str:
    dtype, products = implementation
    return f"{dtype}-{'torch' if products is None else ('float32', 'pairs', 'amx')[products]}"


@pytest.fixture(params=IMPLEMENTATIONS, ids=name_of)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    dtype, products = request.param
    best = native_products(torch.bfloat16)
    if products is not None and (best is None or products > best):
        pytest.skip("this processor does not multiply so")
    monkeypatch.setattr(module, "native_products", lambda dtype: products)
    return dtype


def check(
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int, int],
    widths: tuple[int, int] = (16, 16),
    first_visible_BT: Tensor | None = None,
    scale: float | None = None,
) -> None:
    n_batch, n_kv_heads, n_group, n_queries, n_keys = sizes
    # In the layout of a projection's output.
    q_BKGTH = random_activations(n_batch, n_queries, n_kv_heads, n_group, widths[0], dtype=dtype).permute(0, 2, 3, 1, 4)
    k_BKSH = random_activations(n_batch, n_keys, n_kv_heads, widths[0], dtype=dtype, seed=1).transpose(1, 2)
    v_BKSE = random_activations(n_batch, n_kv_heads, n_keys, widths[1], dtype=dtype, seed=2)
    inputs = [x.requires_grad_() for x in (q_BKGTH, k_BKSH, v_BKSE)]
    weight = random_activations(n_batch, n_kv_heads, n_group, n_queries, widths[1], dtype=dtype, seed=3)

    out = tiled_attention(*inputs, first_visible_BT, scale)
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    expected = reference(*inputs, first_visible_BT, scale)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    assert out.dtype == dtype
    assert out.permute(0, 3, 1, 2, 4).is_contiguous()
    assert_close(out, expected, dtype, "outputs")
    for name, grad, expected_grad in zip("qkv", grads, expected_grads, strict=True):
        assert_close(grad, expected_grad, dtype, name)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 2, 2),
        (2, 1, 3, 5, 9),
        (1, 2, 2, 128, 256),
        (1, 2, 1, 129, 257),
        (2, 1, 2, 100, 700),
        (1, 1, 1, TILE + 3, TILE + 3),
        (1, 1, 2, 1, 300),
        (1, 3, 1, 300, 300),
        (1, 1, 2, 5, 259),  # the last key of the first tile is the second query's own
    ],
    ids=str,
)
def test_sizes(dtype: torch.dtype, sizes: tuple[int, int, int, int, int]) -> None:
    check(dtype, sizes)


@pytest.mark.parametrize("widths", [(192, 128), (20, 36), (6, 6), (33, 31)], ids=str)
def test_widths(dtype: torch.dtype, widths: tuple[int, int]) -> None:
    check(dtype, (1, 2, 2, 150, 270), widths, scale=0.3)


@pytest.mark.parametrize("window", [2, 100, 300])
def test_windows(dtype: torch.dtype, window: int) -> None:
    first_visible_BT = (torch.arange(200, 600) - window + 1).clamp(min=0)[None]
    check(dtype, (2, 1, 2, 400, 600), first_visible_BT=first_visible_BT)


@pytest.mark.parametrize(
    "lengths",
    [
        [(256, 128, 1, 215), (3, 597)],  # some end at the border of a tile, some have one token: a gradient is 0
        # Some begin with a tile's second or last key; of the tiles that a tile of queries takes, some show one nothing.
        [(257, 900, 40), (255, 745, 197)],
    ],
    ids=["others in each row", "long"],
)
def test_documents(dtype: torch.dtype, lengths: list[tuple[int, ...]]) -> None:
    starts = [torch.tensor([sum(row[:n]) for n, length in enumerate(row) for _ in range(length)]) for row in lengths]
    n_tokens = sum(lengths[0])
    check(dtype, (len(lengths), 2, 1, n_tokens, n_tokens), first_visible_BT=torch.stack(starts))


def test_keys_that_no_query_sees(dtype: torch.dtype) -> None:
    """Tiles of them, which are not visited: their gradients are 0."""
    first_visible_BT = torch.arange(900, 910)[None] - 20
    check(dtype, (2, 1, 2, 10, 910), first_visible_BT=first_visible_BT)


def test_large_scores(dtype: torch.dtype) -> None:
    """The largest score of a query comes late, and by far: what was added up before counts for nothing."""
    length = TILE + 100
    q = torch.ones(1, 1, 1, length, 16, dtype=dtype)
    k = (
        (torch.arange(length, dtype=torch.float64) / 16)[None, None, :, None]
        .expand(-1, -1, -1, 16)
        .to(dtype)
        .contiguous()
    )
    v = random_activations(1, 1, length, 16, dtype=dtype)
    for sign in (1, -1):
        assert_close(tiled_attention(q, sign * k, v), reference(q, sign * k, v), dtype, "outputs")


def test_weights_are_those_of_the_exponential(dtype: torch.dtype) -> None:
    """Of two keys the first one's score is lower by up to 8: its weight, however small, has the digits of the dtype."""
    q, k, v = (torch.zeros(shape, dtype=dtype) for shape in ((1, 1, 400, 1, 16), (1, 1, 2, 16), (1, 1, 2, 16)))
    q[0, 0, :, 0, 0] = torch.linspace(-8, 0, 400)
    k[:, :, 0, 0] = v[:, :, 0] = 1
    out, expected = tiled_attention(q, k, v, scale=1.0), reference(q, k, v, scale=1.0)
    # bfloat16 rounds the weight and the output.
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps + 1e-5, atol=0)


@pytest.mark.parametrize("window", [512, 514])
def test_sums_are_not_rounded(dtype: torch.dtype, window: int) -> None:
    """Every query sees as many keys with one weight: bfloat16 may round the mean of whole numbers only once."""
    if dtype == torch.bfloat16 and module.native_products(dtype) is None:
        pytest.skip("products of matrices in bfloat16 are rounded themselves")
    n_queries, width = 600, 20
    n_keys = n_queries + window - 1
    q, k = torch.zeros(1, 1, 2, n_queries, 16, dtype=dtype), torch.zeros(1, 1, n_keys, 16, dtype=dtype)
    v, weight = (
        torch.randint(9, shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)
        for shape in ((1, 1, n_keys, width), (1, 1, 2, n_queries, width))
    )
    v.requires_grad_()
    results = []
    for function in (tiled_attention, reference):
        out = function(q, k, v, torch.arange(n_queries)[None])
        results.append((out, *torch.autograd.grad((out * weight).sum(), v)))
    if window == 514:  # bfloat16 holds neither this number nor its inverse, and gradients are of rounded weights
        results = [(out,) for out, _ in results]
    for actual, expected in zip(*results, strict=True):
        # Half a unit in the last place of bfloat16, and what float32 costs.
        torch.testing.assert_close(actual.double(), expected.double(), rtol=torch.finfo(dtype).eps / 2 + 5e-6, atol=0)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("sizes", [(1, 1, 2, 600, 700), (2, 2, 2, 300, 700)], ids=str)
def test_threads_that_share_a_head(dtype: torch.dtype, sizes: tuple[int, int, int, int, int], n_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        check(dtype, sizes, first_visible_BT=torch.arange(sizes[3])[None] // 2)
    finally:
        torch.set_num_threads(before)


def test_what_lies_beside_is_left_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tensors are cut out of larger ones of NaN, which are neither read nor written."""
    larger = []

    def cut_out(tensor: Tensor) -> Tensor:
        """The same within a larger one: 200 rows and 3 columns more, and another head."""
        n_batch, n_heads, *group, n_rows, width = tensor.shape
        whole = torch.full((n_batch, n_heads + 1, *group, n_rows + 200, width + 3), torch.nan, dtype=tensor.dtype)
        part = whole[:, :n_heads, ..., :n_rows, :width]
        part.copy_(tensor)
        larger.append((whole, part))
        return part

    empty_outputs, empty_gradients = module._empty_outputs, module._empty_gradients
    monkeypatch.setattr(
        module, "_empty_outputs", lambda q, v: (cut_out(empty_outputs(q, v)[0]), empty_outputs(q, v)[1])
    )
    monkeypatch.setattr(module, "_empty_gradients", lambda *inputs: tuple(map(cut_out, empty_gradients(*inputs))))
    shapes = ((2, 2, 3, 150, 20), (2, 2, 270, 20), (2, 2, 270, 36), (2, 2, 3, 150, 36))
    q, k, v, grad = (cut_out(random_activations(*shape, dtype=dtype, seed=seed)) for seed, shape in enumerate(shapes))
    out, lse = module._attend(q, k, v, None, 0.3)
    grads = module._differentiate(q, k, v, None, 0.3, out, lse, grad)

    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = reference(*inputs, None, 0.3)
    expected_grads = torch.autograd.grad((expected * grad).sum(), inputs)
    names = ("outputs", "q", "k", "v")
    for name, actual, wanted in zip(names, (out, *grads), (expected, *expected_grads), strict=True):
        assert_close(actual, wanted, dtype, name)
    assert {x.data_ptr() for x in (out, *grads)} <= {part.data_ptr() for _, part in larger}
    for whole, part in larger:
        part.fill_(torch.nan)
        assert whole.isnan().all()


def test_nothing_is_read_past_the_end(dtype: torch.dtype) -> None:
    """Behind the last number of each tensor lies memory that must not be touched: who does ends the process."""
    libc, kept = ctypes.CDLL(None, use_errno=True), []

    def before_a_wall(tensor: Tensor) -> Tensor:
        n_bytes = tensor.numel() * tensor.itemsize
        wall = -(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, wall + mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        no_access = 0
        assert libc.mprotect(ctypes.c_void_p(start + wall), ctypes.c_size_t(mmap.PAGESIZE), no_access) == 0
        kept.append(memory)
        copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=wall - n_bytes)
        return copy.view(tensor.shape).copy_(tensor)

    shapes = ((1, 1, 2, 150, 20), (1, 1, 270, 20), (1, 1, 270, 36), (1, 1, 2, 150, 36))
    q, k, v, grad = (
        before_a_wall(random_activations(*shape, dtype=dtype, seed=seed)) for seed, shape in enumerate(shapes)
    )
    first_visible_BT = before_a_wall(torch.arange(150)[None] // 2)
    out, lse = (before_a_wall(x) for x in module._attend(q, k, v, first_visible_BT, 0.3))
    grads = module._differentiate(q, k, v, first_visible_BT, 0.3, out, lse, grad)
    assert all(x.isfinite().all() for x in (out, *grads))


def test_any_layout(dtype: torch.dtype) -> None:
    """A last axis that is not contiguous, an expanded gradient, every second number of a tensor of first keys."""
    q = random_activations(1, 1, 2, 8, 30, dtype=dtype).transpose(3, 4)
    k = random_activations(1, 1, 8, 40, dtype=dtype, seed=1).transpose(2, 3)
    v = random_activations(1, 1, 40, 16, dtype=dtype, seed=2)[..., ::2]
    first_visible_BT = (torch.arange(60) // 6)[None, ::2]
    inputs = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for function in (tiled_attention, reference):
        out = function(*inputs, first_visible_BT)
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    for name, actual, expected in zip(("outputs", "q", "k", "v"), *results, strict=True):
        assert_close(actual, expected, dtype, name)


def test_the_same_again(dtype: torch.dtype) -> None:
    q = random_activations(1, 2, 2, 300, 32, dtype=dtype)
    inputs = [q, *(random_activations(1, 2, 300, 32, dtype=dtype, seed=seed) for seed in (1, 2))]
    inputs = [x.requires_grad_() for x in inputs]
    results = []
    for _ in range(3):
        out = tiled_attention(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("channel", [3, 18])
def test_a_nan_that_is_seen_stays_one(dtype: torch.dtype, channel: int) -> None:
    q, kv = random_activations(1, 1, 1, 40, 20, dtype=dtype), random_activations(1, 1, 40, 20, dtype=dtype, seed=1)
    kv[0, 0, 30, channel] = torch.nan
    out = tiled_attention(q, kv, torch.ones_like(kv))
    assert out[0, 0, 0, 30:].isnan().all()
    assert out[0, 0, 0, :30].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_whole(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    first_visible_BT = (torch.arange(300) // 90 * 90)[None]
    weights = [random_activations(32, 96, dtype=dtype, seed=seed).requires_grad_() for seed in (1, 2)]
    x_BTD = random_activations(2, 300, 32, dtype=dtype)

    def layer(x_BTD: Tensor, w_in: Tensor, w_out: Tensor, first_visible_BT: Tensor) -> Tensor:
        q, k, v = (x_BTD @ w_in).unflatten(2, (3, 2, 16)).unbind(2)
        q_BKGTH = q.transpose(1, 2)[:, :, None]
        out = tiled_attention(q_BKGTH, k.transpose(1, 2), v.transpose(1, 2), first_visible_BT)
        return out.permute(0, 3, 1, 2, 4).flatten(2) @ w_out.T[:32]

    def run(function: object) -> list[Tensor]:
        out = function(x_BTD, *weights, first_visible_BT)  # type: ignore[operator]
        return [out, *torch.autograd.grad(out.float().square().sum(), weights)]

    compiled = run(torch.compile(layer, fullgraph=True, dynamic=False))
    for name, actual, expected in zip(("outputs", "w_in", "w_out"), compiled, run(layer), strict=True):
        assert_close(actual, expected, dtype, name)


def test_operator_registration() -> None:
    q = random_activations(1, 2, 2, 40, 16, dtype=torch.float32).requires_grad_()
    k, v = (random_activations(1, 2, 40, 16, dtype=torch.float32, seed=seed).requires_grad_() for seed in (1, 2))
    torch.library.opcheck(torch.ops.hydra.tiled_attention.default, (q, k, v, None, 0.25))


def test_wrong_operands_are_refused() -> None:
    if native_products(torch.float32) is None:
        pytest.skip("there is no compiler")
    q, kv = torch.ones(1, 1, 1, 4, 8), torch.ones(1, 1, 4, 8)
    for others in ((kv, (1, 2, 4, 8)), (kv, (1, 1, 5, 8)), ((1, 1, 4, 9), kv), ((2, 1, 4, 8), (2, 1, 4, 8))):
        with pytest.raises(RuntimeError, match="must fit together"):
            tiled_attention(q, *(x if isinstance(x, Tensor) else torch.ones(x) for x in others))
    with pytest.raises(AssertionError):
        tiled_attention(torch.ones(1, 1, 1, 5, 8), kv, kv)
    with pytest.raises(RuntimeError, match="the last axis must be contiguous"):
        module._attend(q[..., ::2], kv[..., :4], kv, None, 1.0)
    with pytest.raises(RuntimeError, match="no size may be 0"):
        tiled_attention(q[:, :, :, :0], kv, kv)
    with pytest.raises(RuntimeError, match="one dtype"):
        tiled_attention(q, kv, kv.bfloat16())
    for first_visible_BT in (torch.zeros(1, 4), *(torch.zeros(s, dtype=torch.int64) for s in ((1, 3), (2, 4), (4,)))):
        with pytest.raises(RuntimeError, match="first_visible must be int64"):
            tiled_attention(q, kv, kv, first_visible_BT)
    with pytest.raises(RuntimeError, match="scale must be positive"):
        tiled_attention(q, kv, kv, None, -1.0)


def test_without_a_compiler_plain_torch_does_the_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(name: str) -> None:
        raise ConfigError(f"{name} needs a compiler")

    monkeypatch.setattr(module, "load_library", refuse)
    assert native_products.__wrapped__(torch.float32) is None
    assert "needs a compiler" in caplog.text


def test_products_are_what_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    best = native_products(torch.bfloat16)
    assert native_products(torch.float64) is native_products(torch.float16) is None
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("there is no compiler")
    assert best is not None, "a kernel that does not compile must not go unnoticed: its tests are left out"
    assert native_products(torch.float32) == FLOAT32
    has_pairs = torch.ops.hydra.tiled_attention_has_pairs()
    for has_amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_amx=has_amx: has_amx)
        assert native_products.__wrapped__(torch.bfloat16) == ((PAIRS, AMX)[has_amx] if has_pairs else FLOAT32)

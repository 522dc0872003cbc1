"""The C++ kernels of a decode step against plain torch, at odd sizes, with several threads and after a fork."""

import os
import threading

import pytest
import torch

from hydra.errors import ConfigError
from hydra.kernels._cpp import build
from hydra.kernels.decode import HUGE_PAGE, load_native, native_linear, native_single_query_attention, pack
from hydra.kernels.reference import decode as reference
from hydra.model.framework.quantisation import round_to_int8
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401
from hydra.testing.specs import random_activations
from hydra.testing.tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True, params=[1, 3], ids=["1 thread", "3 threads"])
def native(request: pytest.FixtureRequest) -> None:
    load_native(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_rows", [1, 2, 3, 7])
@pytest.mark.parametrize(("n_in", "n_out"), [(384, 64), (1, 1), (33, 61), (100, 5), (130, 4)])
def test_linear(
    n_in: int,
    n_out: int,
    n_rows: int,
    dtype: torch.dtype,
    nan_poisoned_memory: None,  # noqa: F811
) -> None:
    x_B1I = random_activations(n_rows, 1, n_in, dtype=dtype)
    weight_OI = random_activations(n_out, n_in, dtype=dtype, seed=1)
    out_B1O = native_linear(x_B1I, weight_OI)
    assert out_B1O.shape == (n_rows, 1, n_out)
    assert out_B1O.dtype == dtype
    assert_close(out_B1O[:, 0], reference.linear(x_B1I[:, 0], weight_OI), dtype, "outputs")
    for row in range(n_rows):
        alone = native_linear(x_B1I[row : row + 1], weight_OI)
        assert_close(alone[0], out_B1O[row], torch.float32, f"row {row} alone")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_rows", [1, 2, 3, 7])
@pytest.mark.parametrize(("n_in", "n_out"), [(384, 64), (1, 1), (33, 61), (1600, 5)])
def test_int8_linear(n_in: int, n_out: int, n_rows: int, dtype: torch.dtype) -> None:
    """Weights enter exactly, activations rounded by at most half of 1 / 32512 of the largest of their row.

    So an output is off by at most that times the sum of its weights' magnitudes, beside the float32 sums of the
    reference; over all outputs by far less than the 2e-3 that bfloat16 activations would cost.
    """
    x_BI = random_activations(n_rows, n_in, dtype=dtype)
    matrix = round_to_int8(random_activations(n_out, n_in, dtype=torch.float32, seed=1))
    out_BO = native_linear(x_BI, matrix.weight_OI, matrix.scales_O)
    expected_BO = reference.linear(x_BI, matrix.weight_OI, matrix.scales_O)
    assert_close(out_BO, expected_BO, torch.bfloat16, "outputs")
    if dtype == torch.float32:
        half_step_B1 = x_BI.abs().amax(1, keepdim=True) / 32512 / 2
        limit_BO = half_step_B1 * matrix.dequantise(dtype).abs().sum(1)
        in_sums = 1e-6 * (x_BI.abs() @ matrix.dequantise(dtype).abs().T)
        error_BO = (out_BO - expected_BO).abs()
        assert (error_BO <= limit_BO + in_sums).all()
        assert error_BO.norm() <= 1e-4 * expected_BO.norm()


def test_int8_linear_of_extremes() -> None:
    """Rows of zeros, and the largest products everywhere: no whole number overflows."""
    n_in = 16384
    weight_OI = torch.tensor([1, 255], dtype=torch.uint8)[:, None].expand(2, n_in).contiguous()
    x_BI = torch.stack([torch.full((n_in,), 3.0), torch.full((n_in,), -3.0), torch.zeros(n_in)])
    out_BO = native_linear(x_BI, weight_OI, torch.ones(2))
    top = 3.0 * 127 * n_in
    assert_close(out_BO, torch.tensor([[-top, top], [top, -top], [0, 0]]), torch.float32, "outputs")


def test_a_nan_stays_one() -> None:
    x_BI = torch.ones(1, 40)
    x_BI[0, 3] = torch.nan
    assert native_linear(x_BI, torch.ones(2, 40)).isnan().all()
    assert native_linear(x_BI.bfloat16(), torch.ones(2, 40).bfloat16()).isnan().all()
    weight = round_to_int8(torch.ones(2, 40))
    for place, bad in ((3, torch.nan), (39, torch.nan), (3, torch.inf)):
        x_2I = torch.ones(2, 40)
        x_2I[0, place] = bad
        out_2O = native_linear(x_2I, weight.weight_OI, weight.scales_O)
        assert out_2O[0].isnan().all()
        assert out_2O[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "width"), [(6, 6, 64), (6, 2, 10), (4, 1, 33)])
def test_attention(n_heads: int, n_kv_heads: int, width: int, dtype: torch.dtype) -> None:
    """Rows that see different numbers of keys, one with a gap; what they do not see is NaN, and is not read."""
    n_visible = torch.tensor([1, 7, 33])
    mask_BS = torch.where(torch.arange(33) < n_visible[:, None], 0.0, -torch.inf)
    q_BN1H = random_activations(3, n_heads, 1, width, dtype=dtype)
    k_BKSH = random_activations(3, n_kv_heads, 33, width, dtype=dtype, seed=1)
    v_BKSH = random_activations(3, n_kv_heads, 33, width, dtype=dtype, seed=2)
    for row, n in enumerate(n_visible.tolist()):
        k_BKSH[row, :, n:] = torch.nan
        v_BKSH[row, :, n:] = torch.nan
    mask_BS[2, 4:9] = -torch.inf
    mask_B11S = mask_BS[:, None, None].to(dtype)
    out_BN1H = native_single_query_attention(q_BN1H, k_BKSH, v_BKSH, mask_B11S)
    assert_close(out_BN1H, reference.single_query_attention(q_BN1H, k_BKSH, v_BKSH, mask_B11S), dtype, "outputs")
    shared = native_single_query_attention(q_BN1H[2:], k_BKSH[2:], v_BKSH[2:], mask_B11S[2:])
    assert torch.equal(shared, out_BN1H[2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "width", "value_width"),
    # The last two: as a processor's matrix unit takes them, with one head less than it may have, and with all.
    [(7, 1, 48, 84), (4, 2, 48, 84), (3, 3, 48, 84), (30, 2, 64, 96), (16, 1, 96, 32)],
)
def test_attention_over_several_chunks(
    n_heads: int, n_kv_heads: int, width: int, value_width: int, dtype: torch.dtype
) -> None:
    """A window that starts within a chunk, a row of one chunk, gaps of a whole chunk and of single keys, all NaN."""
    length = 1800
    mask_BS = torch.zeros(3, length)
    mask_BS[0, :700] = -torch.inf
    mask_BS[1, 130:] = -torch.inf
    mask_BS[2, 600:1300] = -torch.inf
    mask_BS[2, 3::7] = -torch.inf
    q_BN1H = random_activations(3, n_heads, 1, width, dtype=dtype)
    k_BKSH = random_activations(3, n_kv_heads, length, width, dtype=dtype, seed=1)
    v_BKSE = random_activations(3, n_kv_heads, length, value_width, dtype=dtype, seed=2)
    k_BKSH[2, :, 1700] *= 20  # the largest score comes late
    is_hidden_B1S1 = (mask_BS == -torch.inf)[:, None, :, None]
    k_BKSH, v_BKSE = k_BKSH.masked_fill(is_hidden_B1S1, torch.nan), v_BKSE.masked_fill(is_hidden_B1S1, torch.nan)
    mask_B11S = mask_BS[:, None, None].to(dtype)
    out_BN1E = native_single_query_attention(q_BN1H, k_BKSH, v_BKSE, mask_B11S)
    assert_close(out_BN1E, reference.single_query_attention(q_BN1H, k_BKSH, v_BKSE, mask_B11S), dtype, "outputs")


def test_threads_change_no_bit_of_attention() -> None:
    q, mask = random_activations(1, 4, 1, 32, dtype=torch.float32), torch.zeros(1, 1, 1, 3000)
    k, v = (random_activations(1, 2, 3000, 32, dtype=torch.float32, seed=seed) for seed in (1, 2))
    outputs = []
    for n_threads in (1, 2, 5):
        load_native(n_threads)
        outputs.append(native_single_query_attention(q, k, v, mask))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_a_nan_that_is_seen_stays_one() -> None:
    mask = torch.zeros(1, 1, 1, 5)
    for place in range(3):
        tensors = [torch.ones(1, 2, 1, 8), torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 8)]
        tensors[place][0, 1, 0, 3] = torch.nan
        for attend in (native_single_query_attention, reference.single_query_attention):
            is_nan = attend(*tensors, mask).isnan()[0, :, 0]
            assert not is_nan[0].any()
            assert is_nan[1].any()


def test_a_row_that_sees_nothing_gives_zeros() -> None:
    q, kv = torch.ones(1, 2, 1, 8), torch.full((1, 2, 5, 8), torch.nan)
    assert (native_single_query_attention(q, kv, kv, torch.full((1, 1, 1, 5), -torch.inf)) == 0).all()


def test_wrong_operands_are_refused() -> None:
    x, weight = torch.ones(1, 8), torch.ones(4, 8)
    with pytest.raises(RuntimeError, match="last size"):
        native_linear(x, torch.ones(4, 9))
    with pytest.raises(RuntimeError, match="dtype"):
        native_linear(x, weight.bfloat16())
    with pytest.raises(RuntimeError, match="contiguous"):
        native_linear(x, torch.ones(8, 4).T)
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        native_linear(x.double(), weight.double())


def test_callers_in_several_threads_and_a_forked_child_get_the_same() -> None:
    x_BI, weight_OI = random_activations(1, 300, dtype=torch.float32), random_activations(999, 300, dtype=torch.float32)
    expected = native_linear(x_BI, weight_OI)
    wrong = []

    def call() -> None:
        wrong.extend(i for i in range(200) if not torch.equal(native_linear(x_BI, weight_OI), expected))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(native_linear(x_BI, weight_OI), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_packed_tensors_are_copies_in_order() -> None:
    tensors = [torch.arange(5, dtype=torch.uint8), torch.randn(3, 7), torch.randn(4).bfloat16()]
    packed = pack(tensors)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(packed, tensors, strict=True))
    starts = [copy.data_ptr() for copy in packed]
    assert starts[0] % HUGE_PAGE == 0
    assert starts == sorted(starts)
    assert all(start % 64 == 0 for start in starts)


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no-such-compiler is not on the path"):
        build.load_library.__wrapped__("decode")


def test_a_source_that_does_not_compile_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("-std=c++20", "-shared", "-fPIC", "-include", "/no/such/header.h"))
    with pytest.raises(ConfigError, match="must compile"):
        build.load_library.__wrapped__("decode")
    assert not list(build.cache_folder().iterdir())

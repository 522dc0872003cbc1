"""Claims of MiniMax-01 (arXiv 2501.08313) on lightning attention; numbers are those of spec/architectures.md 4."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydra.attention import build_attention
from hydra.attention.backends.lightning.attention import LightningAttention, compute_slopes
from hydra.attention.backends.lightning.spec import LightningSpec
from hydra.kernels.lightning_attention import CHUNK, count_lightning_flops, lightning_attention
from hydra.kernels.reference.lightning_attention import lightning_attention as recurrence
from hydra.testing.specs import build_random_layer, random_activations
from hydra.testing.tolerances import assert_close


def build(dtype: torch.dtype = torch.float64, n_heads: int = 4, **options: int) -> LightningAttention:
    layer = build_random_layer("lightning", 32, n_heads, dtype, **options)
    assert isinstance(layer, LightningAttention)
    return layer


def spec_of(n_heads: int, layer_index: int, n_layers: int) -> LightningSpec:
    return LightningSpec(d_model=n_heads, n_heads=n_heads, layer_index=layer_index, n_layers=n_layers, gate_rank=0)


def slopes_of(n_heads: int, layer_index: int = 0, n_layers: int = 1) -> Tensor:
    return compute_slopes(spec_of(n_heads, layer_index, n_layers), torch.device("cpu"), torch.float64)


def draw_heads(n_tokens: int, n_heads: int = 4, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (random_activations(2, n_tokens, n_heads, width, seed=seed) for seed in range(3))
    return q, k, v


def quadratic(q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, slopes_N: Tensor) -> Tensor:
    """O = [(Q K^T) o M] V with M_ts = lambda^(t - s) for t >= s and 0 otherwise."""
    times_T = torch.arange(q_BTNH.shape[1])
    distances_TT = times_T[:, None] - times_T
    weight_NTT = torch.exp(-slopes_N[:, None, None] * distances_TT).tril()
    return torch.einsum("btnh,bsnh,nts,bsng->btng", q_BTNH, k_BTNH, weight_NTT, v_BTNH)


@pytest.mark.parametrize("t", [0, 4, 8])
def test_01_changing_a_token_changes_no_earlier_output(t: int) -> None:
    layer, x_BTD = build(), random_activations(2, 9, 32)
    changed_BTD = x_BTD.clone()
    changed_BTD[:, t] = -changed_BTD[:, t]
    is_same_T = (layer(x_BTD) == layer(changed_BTD)).all(-1).all(0)
    assert is_same_T.tolist() == [True] * t + [False] * (9 - t)


@pytest.mark.parametrize("n_tokens", [1, 5, 8, 13, 17])
def test_02_quadratic_recurrent_and_chunked_forms_are_equal(n_tokens: int) -> None:
    q, k, v = draw_heads(n_tokens)
    expected = quadratic(q, k, v, slopes_of(4))
    assert_close(recurrence(q, k, v, slopes_of(4))[0], expected, torch.float64, "recurrent")
    assert_close(lightning_attention(q, k, v, slopes_of(4), chunk=8)[0], expected, torch.float64, "chunked")


@torch.no_grad()
@pytest.mark.parametrize("n_prefilled", [1, 6, 300])
def test_03_prefilled_state_and_decoding_equal_one_pass(n_prefilled: int) -> None:
    layer, x_BTD = build(), random_activations(2, n_prefilled + 5, 32)
    cache = layer.new_cache(2, n_prefilled + 5)
    pieces = [layer(x_BTD[:, :n_prefilled], cache=cache)]
    pieces += [layer(x_BTD[:, t : t + 1], cache=cache) for t in range(n_prefilled, n_prefilled + 5)]
    assert_close(torch.cat(pieces, dim=1), layer(x_BTD), torch.float64, "outputs")


@torch.no_grad()
def test_04_state_bytes_do_not_depend_on_the_number_of_tokens() -> None:
    layer = build(torch.bfloat16)
    sizes = []
    for n_tokens in (1024, 16384):
        cache = layer.new_cache(1, n_tokens)
        layer(random_activations(1, n_tokens, 32, dtype=torch.bfloat16), cache=cache)
        sizes.append(sum(x.untyped_storage().nbytes() for x in vars(cache).values() if isinstance(x, Tensor)))
    assert sizes == [layer.constant_state_bytes] * 2 == [4 * 8 * 8 * 4] * 2
    assert layer.kv_bytes_per_token == 0


@pytest.mark.parametrize("n_heads", [1, 6, 8, 16])
@pytest.mark.parametrize("n_layers", [1, 2, 80])
def test_05_slopes_table(n_layers: int, n_heads: int) -> None:
    """slope_h = (2^(-8/H))^h (1 - l / (L - 1 + 1e-5) + 1e-5), h from 1, l from 0; H need not be a power of 2."""
    for layer_index in range(n_layers):
        factor = 1 - layer_index / (n_layers - 1 + 1e-5) + 1e-5
        expected = [(2 ** (-8 / n_heads)) ** h * factor for h in range(1, n_heads + 1)]
        slopes_N = slopes_of(n_heads, layer_index, n_layers)
        assert_close(slopes_N, torch.tensor(expected, dtype=torch.float64), torch.float64, "slopes")
        assert (slopes_N > 0).all()
        assert (slopes_N.diff() < 0).all()
    # Numbers that do not come from the formula: first and last head of 8, first and last layer of 80.
    assert slopes_of(8, 0, 80)[[0, 7]].tolist() == pytest.approx([0.500005, 0.00390628906], rel=1e-7)
    # The last layer hardly forgets: 79 / 79.00001 is 1 - 1.266e-7.
    assert slopes_of(8, 79, 80)[0].item() == pytest.approx(0.5 * (1e-5 + 1.2658e-7), rel=1e-3)


def test_05_slopes_are_those_of_the_layer() -> None:
    """What the layer computes with, in float32 whatever its dtype, after a stay on the meta device and a cast."""
    expected_N = slopes_of(4, 3, 6)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer = build(dtype, layer_index=3, n_layers=6)
        cache = layer.new_cache(1, 2)
        # One token, then one without values: what is left of the state is the decay itself.
        for _ in range(2):
            layer(random_activations(1, 1, 32, dtype=dtype), cache=cache)
            if cache.history.n_tokens == 1:
                before = cache.state_BNHH.clone()
                nn.init.zeros_(layer.v_proj.weight)
        decay_N = (cache.state_BNHH / before).detach()[0].flatten(1).mean(1)
        assert_close(-decay_N.double().log(), expected_N, torch.promote_types(dtype, torch.float32), "slopes")
        assert not list(layer.buffers())
        assert "slope" not in " ".join(layer.state_dict())


@pytest.mark.parametrize("s", [0, 3, 7, 10])
def test_06_impulse_response_is_the_decay(s: int) -> None:
    """A value at one token alone reaches every later output with weight lambda^(t - s), its own with weight 1."""
    n_tokens, slopes_N = 19, slopes_of(4)
    q = k = torch.ones(1, n_tokens, 4, 1, dtype=torch.float64)
    v = torch.zeros_like(q)
    v[:, s] = 1.0
    out_BTNH, state_BNHH = lightning_attention(q, k, v, slopes_N, chunk=4)
    for t in range(n_tokens):
        expected_N = torch.exp(-slopes_N * (t - s)) if t >= s else torch.zeros_like(slopes_N)
        assert_close(out_BTNH[0, t, :, 0] + 1, expected_N + 1, torch.float64, f"output {t}")
    assert_close(state_BNHH[0, :, 0, 0], torch.exp(-slopes_N * (n_tokens - 1 - s)), torch.float64, "state")


def test_07_output_is_linear_in_values() -> None:
    q, k, v = draw_heads(13)
    other = random_activations(2, 13, 4, 5, seed=9)

    def compute(values: Tensor) -> Tensor:
        return lightning_attention(q, k, values, slopes_of(4), chunk=4)[0]

    assert_close(compute(3 * v - 2 * other), 3 * compute(v) - 2 * compute(other), torch.float64, "outputs")


def test_08_positions_are_not_used() -> None:
    layer, x_BTD = build(), random_activations(2, 9, 32)
    out_BTD, positions_BT = layer(x_BTD), torch.arange(9)[None]
    for others_BT in (positions_BT + 1000, positions_BT * 7, positions_BT.flip(1)):
        assert torch.equal(layer(x_BTD, positions_BT=others_BT), out_BTD)
    # Nor is a place counted in secret: without decay, the order of earlier tokens does not matter.
    q, k, v = draw_heads(9)
    order = [3, 1, 0, 2, 7, 6, 5, 4, 8]
    last = [
        lightning_attention(q[:, o], k[:, o], v[:, o], torch.zeros(4), chunk=4)[0][:, -1] for o in (order, range(9))
    ]
    assert_close(*last, torch.float64, "last output")


@pytest.mark.parametrize("n_tokens", [600, 512, 63])
def test_09_chunk_size_does_not_matter(n_tokens: int) -> None:
    q, k, v = draw_heads(n_tokens)
    expected_out, expected_state = recurrence(q, k, v, slopes_of(4))
    for chunk in (64, 128, 256):
        out, state = lightning_attention(q, k, v, slopes_of(4), chunk=chunk)
        assert_close(out, expected_out, torch.float64, f"outputs, chunk {chunk}")
        assert_close(state, expected_state, torch.float64, f"state, chunk {chunk}")
    assert CHUNK == 256


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_10_one_token_gives_its_score_times_its_value(scale: float) -> None:
    """No 1 / sqrt(H), and no denominator: the output is of degree 3 in the inputs."""
    q, k, v = (scale * x for x in draw_heads(1))
    out = lightning_attention(q, k, v, slopes_of(4))[0]
    assert_close(out, (q * k).sum(-1, keepdim=True) * v, torch.float64, "outputs")


@pytest.mark.parametrize("gate_rank", [0, 3])
def test_11_norm_over_all_heads_then_sigmoid_gate(gate_rank: int) -> None:
    """From the operator on by hand: SiLU on q, k and v; one norm for all heads; times sigmoid(gate(x)); o_proj."""
    layer, x_BTD = build(gate_rank=gate_rank), random_activations(2, 7, 32)
    heads = [F.silu(getattr(layer, f"{name}_proj")(x_BTD)).view(2, 7, 4, 8) for name in "qkv"]
    out_BTD = quadratic(*heads, slopes_of(4)).flatten(2)
    normed_BTD = out_BTD / (out_BTD.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm.weight
    gates = ["gate_proj"] if gate_rank == 0 else ["gate_down_proj", "gate_up_proj"]
    gate_BTD = x_BTD
    for name in gates:
        gate_BTD = getattr(layer, name)(gate_BTD)
    assert_close(layer(x_BTD), layer.o_proj(normed_BTD * torch.sigmoid(gate_BTD)), torch.float64, "outputs")
    assert not [name for name, _ in layer.named_parameters() if name.endswith("bias")]


@pytest.mark.parametrize("n_tokens", [256, 1024, 8192])
def test_12_operations_are_linear_in_tokens(n_tokens: int) -> None:
    assert count_lightning_flops(2 * n_tokens, 16, 128) / count_lightning_flops(n_tokens, 16, 128) == 2.00
    assert count_lightning_flops(n_tokens, 16, 128) == 4 * 16 * 128**2 * n_tokens + 4 * 16 * 128 * 256 * n_tokens


@pytest.mark.parametrize(
    ("gate_rank", "millions", "gigaflops_4096", "gigaflops_16384"),
    [(0, 20.974, 184.7, 738.7), (128, 17.304, 154.6, 618.5)],
)
def test_12_table_of_costs(gate_rank: int, millions: float, gigaflops_4096: float, gigaflops_16384: float) -> None:
    """spec/architectures.md 0.1, d_model 2048 with 16 heads. Its 17.306M for the narrow gate is a slip: by the closed
    form of 0.2, 4 E^2 + 2 E d + E, it is 17.304M."""
    with torch.device("meta"):
        layer = build_attention("lightning", d_model=2048, n_heads=16, gate_rank=gate_rank)
    assert sum(parameter.numel() for parameter in layer.parameters()) / 1e6 == pytest.approx(millions, abs=6e-4)
    assert layer.flops(4096) / 1e9 == pytest.approx(gigaflops_4096, abs=0.06)
    assert layer.flops(16384) / 1e9 == pytest.approx(gigaflops_16384, abs=0.06)
    assert layer.constant_state_bytes == 16 * 128 * 128 * 4


@torch.no_grad()
@pytest.mark.parametrize("layer_index", [0, 7])
def test_13_bfloat16_over_32k_tokens_is_finite_and_right(layer_index: int) -> None:
    """In the last layer nearly nothing is forgotten: the state is a sum over 32,768 tokens."""
    slopes_N = slopes_of(2, layer_index, 8)
    q, k, v = (F.silu(random_activations(1, 32768, 2, 8, seed=seed)).bfloat16() for seed in range(3))
    out_BTNH, state_BNHH = lightning_attention(q, k, v, slopes_N.float())
    exact_BTNH, exact_BNHH = lightning_attention(q.double(), k.double(), v.double(), slopes_N)
    assert out_BTNH.isfinite().all()
    assert state_BNHH.dtype == torch.float32
    assert_close(out_BTNH, exact_BTNH, torch.bfloat16, "outputs")
    # bfloat16 only rounds what each chunk adds: of the last layer's 128 roundings much averages out.
    error = (state_BNHH - exact_BNHH).norm() / exact_BNHH.norm()
    assert error < {0: 3e-3, 7: 1e-3}[layer_index]

"""The decoder against generate, token by token; its C++ kernels against their reference; the gate of 8-bit weights."""

import pytest
import torch

from hydra.attention import available_backends
from hydra.errors import ConfigError, QuantisationError
from hydra.kernels.decode import load_native, native_linear, native_single_query_attention
from hydra.kernels.reference import decode as reference
from hydra.model.framework import Decoder, HydraModel, generate, quantise_int8
from hydra.model.framework.quantisation import ZERO_POINT, round_to_int8
from hydra.testing.specs import build_random_model, random_activations
from hydra.testing.tolerances import assert_close

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9]]
MAX_TOKENS = 24


def build(attention: str, dtype: torch.dtype = torch.float32) -> HydraModel:
    return build_random_model(dtype, attention=attention, feed_forward="squared_relu")


@pytest.fixture(scope="module", params=available_backends())
def model(request: pytest.FixtureRequest) -> HydraModel:
    return build(request.param)


@pytest.fixture(scope="module", params=["compiled", "reference"])
def decoder(request: pytest.FixtureRequest, model: HydraModel) -> Decoder:
    torch.compiler.reset()
    return Decoder(model, max_tokens=MAX_TOKENS, n_streams=len(PROMPTS), implementation=request.param)


def test_each_stream_gives_what_generate_gives_alone(model: HydraModel, decoder: Decoder) -> None:
    expected = [generate(model, prompt, 12, temperature=0.0) for prompt in PROMPTS]
    assert decoder.generate(PROMPTS, 12, temperature=0.0) == expected
    # Nothing of the first call is left in the caches of the second.
    again = [PROMPTS[2], PROMPTS[0], PROMPTS[1]]
    assert decoder.generate(again, 12, temperature=0.0) == [expected[2], expected[0], expected[1]]


def test_draws_depend_on_the_seed_and_the_stream_only(model: HydraModel, decoder: Decoder) -> None:
    drawn = decoder.generate(PROMPTS, 12, temperature=1.0, top_k=20, seed=5)
    assert drawn == [generate(model, p, 12, temperature=1.0, top_k=20, seed=5 + row) for row, p in enumerate(PROMPTS)]
    assert decoder.generate(PROMPTS, 12, temperature=1.0, top_k=20, seed=6) != drawn
    assert decoder.generate(PROMPTS, 0) == [[], [], []]


def test_what_cannot_be_decoded_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ConfigError, match="3 streams, but got 1"):
        decoder.generate(PROMPTS[:1], 2)
    with pytest.raises(ConfigError, match="max_tokens=24, but got 27"):
        decoder.generate(PROMPTS, 20)
    with pytest.raises(ConfigError, match="prompt_ids must be at least one id"):
        decoder.generate([[1], [], [2]], 2)


def test_a_dtype_without_kernels_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dtype must be one of torch\.float32, torch\.bfloat16"):
        Decoder(build("gqa", torch.float64), max_tokens=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_rows", [1, 3, 8])
@pytest.mark.parametrize(("n_outputs", "n_inputs"), [(1, 1), (7, 33), (64, 96), (130, 257)])
@pytest.mark.parametrize("is_int8", [False, True], ids=["own", "int8"])
def test_native_linear(is_int8: bool, n_outputs: int, n_inputs: int, n_rows: int, dtype: torch.dtype) -> None:
    load_native(2)
    x_BI = random_activations(n_rows, n_inputs, dtype=dtype)
    weight_OI = random_activations(n_outputs, n_inputs, dtype=dtype, seed=1)
    if is_int8:
        matrix = round_to_int8(weight_OI)
        arguments = (matrix.weight_OI, matrix.scales_O)
    else:
        arguments = (weight_OI, None)
    ours, expected = native_linear(x_BI, *arguments), reference.linear(x_BI, *arguments)
    assert ours.dtype == dtype
    # 8-bit products take activations as 16-bit whole numbers.
    assert_close(ours, expected, torch.bfloat16 if is_int8 or dtype == torch.bfloat16 else dtype, "outputs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "width"), [(4, 4, 8), (6, 2, 16), (3, 1, 6)])
@pytest.mark.parametrize("n_visible", [1, 7, 40])
def test_native_attention_reads_nothing_that_is_masked(
    n_visible: int, n_heads: int, n_kv_heads: int, width: int, dtype: torch.dtype
) -> None:
    load_native(2)
    q = random_activations(2, n_heads, 1, width, dtype=dtype)
    k, v = (random_activations(2, n_kv_heads, 40, width, dtype=dtype, seed=seed) for seed in (1, 2))
    k[:, :, n_visible:], v[:, :, n_visible:] = torch.nan, torch.nan
    mask = torch.zeros(2, 1, 1, 40, dtype=dtype)
    mask[..., n_visible:] = -torch.inf
    ours, expected = native_single_query_attention(q, k, v, mask), reference.single_query_attention(q, k, v, mask)
    assert_close(ours, expected, dtype, "outputs")


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids_BT = torch.randint(61, (4, 33), generator=torch.Generator().manual_seed(0))
    return [(ids_BT[:2, :-1], ids_BT[:2, 1:]), (ids_BT[2:, :-1], ids_BT[2:, 1:])]


def test_rounding_to_8_bits_is_within_half_a_step() -> None:
    weight_OI = random_activations(5, 40)
    weight_OI[3] = 0.0
    matrix = round_to_int8(weight_OI)
    assert matrix.weight_OI.dtype == torch.uint8
    error = (matrix.dequantise(torch.float64) - weight_OI).abs()
    assert (error <= 0.5001 * matrix.scales_O[:, None]).all()
    assert (matrix.weight_OI[3] == ZERO_POINT).all()


def test_8_bit_weights_pass_the_gate_and_decode(model: HydraModel) -> None:
    int8 = quantise_int8(model, batches())
    assert abs(int8.int8_loss_nats - int8.loss_nats) < 0.01
    torch.compiler.reset()
    compiled = Decoder(model, max_tokens=MAX_TOKENS, int8=int8)
    slow = Decoder(model, max_tokens=MAX_TOKENS, int8=int8, implementation="reference")
    for decoder in (compiled, slow):
        decoder._prefill([PROMPTS[0]])
        decoder.next_ids_B.fill_(7)
    # Activations are rounded to 16 bits in one and not in the other.
    assert_close(compiled.decode_step(), slow.decode_step(), torch.bfloat16, "logits")


def test_weights_that_8_bits_cannot_hold_are_refused() -> None:
    model = build("gqa")
    with torch.no_grad():  # one weight so large that all others of its row are rounded to nothing
        for block in model.blocks:
            block.feed_forward.down.weight[:, 0] *= 1e5
    with pytest.raises(QuantisationError, match="must raise the loss by at most"):
        quantise_int8(model, batches(), max_increase_nats=1e-6)
    with pytest.raises(ConfigError, match="at least one target"):
        quantise_int8(model, [])


def test_8_bit_weights_of_another_model_are_refused() -> None:
    int8 = quantise_int8(build("ccgqa"), batches())
    with pytest.raises(ConfigError, match="made from the model that it is used with"):
        Decoder(build("gqa"), max_tokens=8, int8=int8, implementation="reference")

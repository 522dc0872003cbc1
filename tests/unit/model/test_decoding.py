"""The fast decoder against generate() and against full forward passes. Compilations are shared: they take seconds."""

from functools import cache

import pytest
import torch

from hydra.attention import available_backends
from hydra.errors import ConfigError, QuantisationError
from hydra.model.framework import Decoder, HydraModel, Int8Weights, generate, quantise_int8
from hydra.model.framework.quantisation import build_dequantised, find_matrices, round_to_int8
from hydra.testing.specs import build_random_model, tiny_model_spec
from hydra.testing.tolerances import assert_close

PROMPTS = [[3, 14, 15, 9, 26], [1], [5, 60, 7, 7, 7, 0, 2]]
MAX_TOKENS = 40


@cache
def model_of(attention: str) -> HydraModel:
    return build_random_model(torch.float32, attention=attention)


@cache
def compiled(attention: str) -> Decoder:
    return Decoder(model_of(attention), max_tokens=MAX_TOKENS, n_streams=3)


@cache
def reference(attention: str) -> Decoder:
    return Decoder(model_of(attention), max_tokens=MAX_TOKENS, n_streams=3, implementation="reference")


def batches(seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(61, (4, 33), generator=generator) for _ in range(2)]
    return [(row[:, :-1], row[:, 1:]) for row in rows]


@cache
def int8_weights(attention: str = "gqa") -> Int8Weights:
    return quantise_int8(model_of(attention), batches(), max_increase_nats=0.05)


@pytest.mark.parametrize("implementation", [compiled, reference], ids=["compiled", "reference"])
@pytest.mark.parametrize("attention", available_backends())
def test_every_stream_is_what_generate_gives_alone(attention: str, implementation: object) -> None:
    decoder = implementation(attention)  # type: ignore[operator]
    for arguments in ({"temperature": 0.0}, {"seed": 5}, {"seed": 8, "temperature": 0.7, "top_k": 9}):
        seed = arguments.get("seed", 0)
        rest = {name: value for name, value in arguments.items() if name != "seed"}
        expected = [generate(model_of(attention), p, 30, seed=seed + b, **rest) for b, p in enumerate(PROMPTS)]
        assert decoder.generate(PROMPTS, 30, **arguments) == expected, arguments
        assert len({tuple(ids) for ids in expected}) == 3


@pytest.mark.parametrize("attention", available_backends())
def test_nothing_is_left_of_the_call_before(attention: str) -> None:
    decoder = compiled(attention)
    first = decoder.generate(PROMPTS, 12, temperature=0.0)
    decoder.generate([[9] * 20, [8] * 11, [7]], 20, seed=3)
    assert decoder.generate(PROMPTS, 12, temperature=0.0) == first
    assert decoder.generate(PROMPTS, 0) == [[], [], []]


def test_the_global_random_state_and_the_model_stay_as_they_were() -> None:
    model = model_of("gqa")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state()
    compiled("gqa").generate(PROMPTS, 5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_two_decoders_do_not_take_each_others_step() -> None:
    """Compiled without guards: what keeps them apart must be tested. Same shapes, other weights."""
    other = build_random_model(torch.float32, attention="gqa")
    with torch.no_grad():
        other.embedding.weight.neg_()
        other.embedding.weight[5] *= 3
    decoder = Decoder(other, max_tokens=MAX_TOKENS, n_streams=3)
    expected = [generate(other, prompt, 10, temperature=0.0) for prompt in PROMPTS]
    assert decoder.generate(PROMPTS, 10, temperature=0.0) == expected
    unlike = [generate(model_of("gqa"), prompt, 10, temperature=0.0) for prompt in PROMPTS]
    assert compiled("gqa").generate(PROMPTS, 10, temperature=0.0) == unlike
    assert unlike != expected


@torch.no_grad()
def step_logits(decoder: Decoder, prompt_ids: list[int], next_ids: list[int]) -> torch.Tensor:
    logits = [decoder._prefill([prompt_ids])]
    for token in next_ids:
        decoder.next_ids_B.fill_(token)
        logits.append(decoder.decode_step())
    return torch.cat([part.clone() for part in logits])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["gqa", "mla"])  # mla also reads a matrix by itself
def test_int8_and_bfloat16_logits_are_those_of_full_passes(attention: str) -> None:
    prompt_ids, next_ids = [4, 8, 15], [16, 23, 42, 0, 1, 2]
    model, weights = model_of(attention), int8_weights(attention)
    exact = build_dequantised(model, weights.matrices)(torch.tensor([prompt_ids + next_ids])).logits_BTV[0, 2:]
    plain = model(torch.tensor([prompt_ids + next_ids])).logits_BTV[0, 2:]
    int8 = Decoder(model, max_tokens=12, dtype=torch.bfloat16, int8=weights)
    assert_close(step_logits(int8, prompt_ids, next_ids), exact, torch.bfloat16, "int8 logits")
    for implementation in ("compiled", "reference"):
        decoder = Decoder(model, max_tokens=12, dtype=torch.bfloat16, implementation=implementation)
        assert_close(step_logits(decoder, prompt_ids, next_ids), plain, torch.bfloat16, f"{implementation} logits")
    slow = Decoder(model, max_tokens=12, int8=weights, implementation="reference")
    assert_close(step_logits(slow, prompt_ids, next_ids), exact, torch.float32, "reference int8 logits")


def test_int8_rounds_each_row_to_its_own_scale() -> None:
    weight_OI = torch.tensor([[1.0, -0.5, 0.0], [0.0, 0.0, 0.0], [100.0, 1.0, -100.0]])
    matrix = round_to_int8(weight_OI)
    assert matrix.weight_OI.tolist() == [[255, 64, 128], [128, 128, 128], [255, 129, 1]]
    error = (matrix.dequantise(torch.float32) - weight_OI).abs()
    assert (error <= matrix.scales_O[:, None] * 0.5 + 1e-7).all()


@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_is_found(tied: bool) -> None:
    model = build_random_model(torch.float32, tie_embeddings=tied)
    names = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.ndim == 2}
    assert set(find_matrices(model)) == names - {"embedding"} | {"head"}


def train_a_little(model: HydraModel) -> None:
    """Until it has learnt to repeat the token of two places before, so that its matrices are not random any more."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        half = torch.randint(61, (16, 2), generator=generator)
        rows = half.repeat(1, 9)
        output = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        (output.losses["cross_entropy"] / output.n_valid_tokens).backward()
        optimizer.step()


def repeating_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    rows = torch.randint(61, (16, 2), generator=torch.Generator().manual_seed(9)).repeat(1, 9)
    return [(rows[:, :-1], rows[:, 1:])]


def test_the_gate_passes_a_trained_model_and_refuses_a_broken_one() -> None:
    model = build_random_model(torch.float32)
    train_a_little(model)
    weights = quantise_int8(model, repeating_batches())
    assert weights.loss_nats < 2.0, "the model must have learnt something"
    assert abs(weights.int8_loss_nats - weights.loss_nats) < 0.01
    # One huge number in each row leaves no steps of the scale for the others, though the model's outputs stay.
    with torch.no_grad():
        for block in model.typed_blocks():
            block.feed_forward_norm.weight[0] = 0.0
            block.feed_forward.up.weight[:, 0] = 1e4
    with pytest.raises(QuantisationError, match=r"at most 0.01 nats per token, but it went from \d+\.\d+ to \d+\.\d+"):
        quantise_int8(model, repeating_batches())
    assert quantise_int8(model, repeating_batches(), max_increase_nats=100.0).int8_loss_nats > weights.loss_nats
    with torch.no_grad():
        model.final_norm.weight[0] = torch.nan
    with pytest.raises(QuantisationError):
        quantise_int8(model, repeating_batches(), max_increase_nats=100.0)


def test_the_gate_needs_targets() -> None:
    inputs_BT = torch.zeros(1, 4, dtype=torch.int64)
    for nothing in ([], [(inputs_BT, torch.full((1, 4), -100))]):
        with pytest.raises(ConfigError, match="at least one target"):
            quantise_int8(model_of("gqa"), nothing)


def test_int8_weights_of_another_model_are_refused() -> None:
    other = build_random_model(torch.float32, d_feed_forward=32)
    with pytest.raises(ConfigError, match="int8 must be made from the model"):
        Decoder(other, max_tokens=8, int8=int8_weights(), implementation="reference")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"n_streams": 0}, "n_streams"),
        ({"implementation": "fast"}, "implementation"),
        ({"dtype": torch.float64}, "dtype must be one of torch.float32, torch.bfloat16"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Decoder(model_of("gqa"), **{"max_tokens": 8, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        (PROMPTS[:2], {}, "one prompt for each of 3 streams, but got 2"),
        ([[1], [], [2]], {}, "prompt_ids must be at least one id"),
        ([[1], [61], [2]], {}, "id from 0 to 60"),
        (PROMPTS, {"n_new_tokens": 34}, "at most max_tokens=40, but got 41"),
        (PROMPTS, {"n_new_tokens": -1}, "n_new_tokens must not be negative"),
        (PROMPTS, {"top_k": 0}, "top_k must be at least 1"),
    ],
)
def test_what_cannot_be_generated_is_refused(prompts: list[list[int]], arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reference("gqa").generate(prompts, **{"n_new_tokens": 3, **arguments})


def test_the_spec_of_the_tests_has_a_tied_head() -> None:
    """Packing has to untie it; the other case is in test_every_matrix_is_found."""
    assert tiny_model_spec().tie_embeddings


@pytest.mark.parametrize("attention", available_backends())
def test_a_trainer_may_have_been_at_work_in_the_process_before(attention: str) -> None:
    """Deterministic mode stays on after training; a decoder neither needs it nor falls over it, and leaves it on."""
    torch.use_deterministic_algorithms(True)
    try:
        Decoder(build_random_model(torch.float32, attention=attention), max_tokens=16).generate([[1, 2]], 3)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)

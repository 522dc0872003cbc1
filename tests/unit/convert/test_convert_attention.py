"""Converters of attention layers, without transformers: what comes back, and what is refused."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from hydra.attention.base import AttentionBackend
from hydra.convert import load_attention, save_attention
from hydra.convert.zaya import take_exponential, take_logarithm
from hydra.errors import CheckpointError, ConfigError
from hydra.testing.specs import build_random_layer, random_activations

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("gqa", {"n_kv_heads": 2, "rope_base": 700.0}),
    "deepseek_v3": ("mla", {"kv_latent_width": 12, "q_latent_width": 10, "rotary_width": 6, "value_width": 7}),
    "deepseek_v3 full queries": ("mla", {"q_latent_width": 0, "rope_base": 700.0}),
    "zaya": ("ccgqa", {"n_query_heads": 4, "n_kv_heads": 2, "rotary_fraction": 0.5, "conv_kernel_0": 3}),
    "minimax": ("lightning", {}),
}


def build_layer(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> AttentionBackend:
    name, own = LAYERS[kind]
    return build_random_layer(name, 32, 4, dtype, layer_index=1, n_layers=3, **{**own, **options})


def save(kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return save_attention(build_layer(kind))


def assert_equal_states(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_comes_back_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    layer = build_layer(kind, dtype)
    config, state = save_attention(layer)
    again = load_attention(config, state, 1)
    assert type(again) is type(layer)
    assert again.spec == layer.spec
    assert all(parameter.requires_grad for parameter in again.parameters())
    expected, actual = layer.state_dict(), again.state_dict()
    if kind == "zaya":  # to half of the last place of its exponential
        temp_K, again_K = expected.pop("temp").double(), actual.pop("temp").double()
        assert bool(((temp_K - again_K).abs() <= torch.finfo(dtype).eps).all())
    assert_equal_states(actual, expected)
    assert_equal_states(save_attention(again)[1], state)


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_are_copies(kind: str) -> None:
    layer = build_layer(kind)
    config, state = save_attention(layer)
    again = load_attention(config, state, 1)
    kept = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for tensor in [*state.values(), *again.parameters()]:
        assert tensor.is_contiguous()
        tensor.data.zero_()
    assert_equal_states(layer.state_dict(), kept)
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperatures_between_1_over_e_and_e_come_back_to_the_bit(dtype: torch.dtype) -> None:
    near_K = torch.linspace(0.3679, 2.7182, 20_001).to(dtype)
    assert torch.equal(take_exponential(take_logarithm(near_K)), near_K)
    far_K = torch.linspace(-6.0, 6.0, 20_001).exp().to(dtype)
    units_K = (take_exponential(take_logarithm(far_K)).double() / far_K.double() - 1).abs() / torch.finfo(dtype).eps
    assert bool((units_K <= far_K.double().log().abs() + 1).all())


@pytest.mark.parametrize("q_latent_width", [0, 5])
def test_rotated_rows_change_places_and_no_others(q_latent_width: int) -> None:
    """Rows of the query: 2 heads of 3 still and 6 rotated channels. Rows of the latent: 5 still, 6 rotated."""
    widths = {"kv_latent_width": 5, "rotary_width": 6, "nope_width": 3, "value_width": 3}
    layer = build_random_layer("mla", 6, 2, torch.float32, q_latent_width=q_latent_width, **widths)
    config, state = save_attention(layer)
    theirs, name = ("q_b_proj.weight", "q_up_proj.weight") if q_latent_width else ("q_proj.weight", "q_proj.weight")
    state[theirs] = torch.arange(18.0)[:, None].repeat(1, q_latent_width or 6)
    state["kv_a_proj_with_mqa.weight"] = torch.arange(11.0)[:, None].repeat(1, 6)
    ours = load_attention(config, state, 0).state_dict()
    head = [0, 1, 2, 3, 5, 7, 4, 6, 8]
    assert ours[name][:, 0].tolist() == head + [9 + row for row in head]
    assert ours["kv_down_proj.weight"][:, 0].tolist() == [0, 1, 2, 3, 4, 5, 7, 9, 6, 8, 10]
    by_halves = load_attention({**config, "rope_interleave": False}, state, 0).state_dict()
    assert torch.equal(by_halves[name], state[theirs])


def test_the_fused_projection_holds_query_key_and_value_of_one_head_after_the_other() -> None:
    config, state = save("minimax")
    state["qkv_proj.weight"] = torch.arange(96.0)[:, None].repeat(1, 32)
    ours = load_attention(config, state, 1).state_dict()
    for place, name in enumerate("qkv"):
        expected = [24 * head + 8 * place + channel for head in range(4) for channel in range(8)]
        assert ours[f"{name}_proj.weight"][:, 0].tolist() == expected


def test_old_configs_mean_what_transformers_makes_of_them() -> None:
    config, state = save("llama")
    del config["rope_parameters"], config["head_dim"], config["attention_bias"]
    assert load_attention({**config, "rope_scaling": None}, state, 1).spec.rope_base == 10000.0  # type: ignore[attr-defined]
    assert load_attention({**config, "rope_theta": 5e5}, state, 1).spec.rope_base == 5e5  # type: ignore[attr-defined]
    config, state = save_attention(build_layer("llama", n_kv_heads=4))
    del config["num_key_value_heads"]
    assert load_attention(config, state, 1).spec.n_kv_heads == 4  # type: ignore[attr-defined]
    config, state = save("deepseek_v3")
    del config["rope_interleave"]
    assert_equal_states(
        load_attention(config, state, 1).state_dict(), load_attention(save("deepseek_v3")[0], state, 1).state_dict()
    )


YARN = {"rope_type": "yarn", "factor": 40, "rope_theta": 10000.0}
SLIDING = ["hybrid", "hybrid_sliding", "hybrid"]
REFUSED_CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "mistral"}, "model_type must be one of deepseek_v3, llama, minimax, zaya"),
    ("llama", {"model_type": None}, "model_type must be in the config"),
    ("llama", {"hidden_size": None}, "hidden_size must be in the config"),
    ("llama", {"num_hidden_layers": None}, "num_hidden_layers must be in the config"),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads must be an integer of at least 1"),
    ("llama", {"hidden_size": "32"}, "hidden_size must be an integer"),
    ("zaya", {"head_dim": 0}, "head_dim must be an integer of at least 1"),
    ("minimax", {"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1"),
    ("llama", {"num_hidden_layers": 1}, "layer_index must be below num_hidden_layers=1"),
    ("llama", {"attention_bias": True}, "attention_bias must be False"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout must be 0.0"),
    ("llama", {"head_dim": 16}, "head_dim must be hidden_size / num_attention_heads"),
    ("llama", {"num_key_value_heads": 3}, "n_kv_heads must divide n_heads"),
    ("llama", {"rope_parameters": YARN}, "rope_type of the rotary embedding must be 'default'"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "factor": 2.0}}, "rope_parameters must hold .* but got factor"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1.0"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "type of the rotary embed"),
    ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling must not stand beside rope_parameters"),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias must be False"),
    ("deepseek_v3", {"rope_parameters": YARN}, "rope_type of the rotary embedding must be 'default'"),
    ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads must be 4"),
    ("deepseek_v3", {"head_dim": 8}, "head_dim must be 6"),
    ("deepseek_v3", {"qk_rope_head_dim": 0}, "qk_rope_head_dim must be at least 2"),
    ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank must be in the config"),
    ("zaya", {"layer_types": SLIDING}, r"layer_types\[1\] must be 'hybrid', but got 'hybrid_sliding'"),
    ("zaya", {"layer_types": ["hybrid"]}, "layer_types must have num_hidden_layers=3 entries"),
    ("zaya", {"attention_bias": True}, "attention_bias must be False"),
    ("zaya", {"head_dim": 12}, "head_dim must divide hidden_size"),
    ("zaya", {"rope_parameters": {"hybrid": YARN}}, "rope_type of the rotary embedding must be 'default'"),
    ("zaya", {"rope_parameters": {"rope_theta": 1e4}}, "hybrid must be in the config"),
    ("zaya", {"cca_time0": None}, "cca_time0 must be in the config"),
    ("minimax", {"layer_types": ["full_attention"] * 3}, r"layer_types\[1\] must be 'linear_attention'"),
    ("minimax", {"layer_types": None}, "layer_types must be in the config"),
    ("minimax", {"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
    ("minimax", {"head_dim": 16}, "head_dim must be hidden_size / num_attention_heads"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED_CONFIGS)
def test_configs_that_cannot_be_computed_are_refused_by_name(kind: str, changes: dict[str, Any], message: str) -> None:
    config, state = save(kind)
    with pytest.raises(ConfigError, match=message):
        load_attention({**config, **changes}, state, 1)


@pytest.mark.parametrize("kind", LAYERS)
def test_each_tensor_is_needed_and_no_other_is_taken(kind: str) -> None:
    config, state = save(kind)
    for name, tensor in state.items():
        rest = {other: value for other, value in state.items() if other != name}
        with pytest.raises(CheckpointError, match=f"weights must hold {name}, but got only"):
            load_attention(config, rest, 1)
        with pytest.raises(CheckpointError, match=rf"{name} must have shape .* but got \(7,"):
            load_attention(config, {**state, name: tensor.new_ones(7, *tensor.shape[1:])}, 1)
        with pytest.raises(CheckpointError, match=f"{name} must be float16, bfloat16, float32 or float64"):
            load_attention(config, {**state, name: tensor.to(torch.int8)}, 1)
    for name in ("q_proj.bias", "rotary_emb.inv_freq", "kv_b_proj.weight_scale_inv"):
        with pytest.raises(CheckpointError, match=f"every weight must be known, but got {name}"):
            load_attention(config, {**state, name: torch.zeros(3)}, 1)


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_of_two_dtypes_are_refused(kind: str) -> None:
    config, state = save(kind)
    last = [name for name in state if name.startswith("o")][-1]
    with pytest.raises(CheckpointError, match=f"all weights must have one dtype, but got .* {last} in torch.bfloat16"):
        load_attention(config, {**state, last: state[last].bfloat16()}, 1)


@pytest.mark.parametrize("value", [0.0, -0.5, float("inf"), float("nan")])
def test_temperatures_that_are_no_exponentials_are_refused(value: float) -> None:
    config, state = save("zaya")
    with pytest.raises(CheckpointError, match=f"qk_norm.temp must be finite and above 0 .* got {value} in head 1"):
        load_attention(config, {**state, "qk_norm.temp": torch.tensor([1.0, value])}, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decays_of_another_layer_are_refused(dtype: torch.dtype) -> None:
    """In bfloat16 too, in which files hold them, and for each of 80 layers."""
    layer = build_random_layer("lightning", 8, 2, dtype, layer_index=40, n_layers=80)
    config, state = save_attention(layer)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    assert torch.equal(load_attention(config, state, 40).state_dict()["norm.weight"], state["norm.weight"])
    for other in (*range(40), *range(41, 80)):
        with pytest.raises(CheckpointError, match="slope_rate must be what the config gives"):
            load_attention(config, state, other)
    for name in ("query_decay", "key_decay", "diagonal_decay"):
        with pytest.raises(CheckpointError, match=f"{name} must be what the config gives"):
            load_attention(config, {**state, name: state[name] * 0.9}, 40)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {"qk_norm": True}, "qk_norm must be False for a Llama"),
        ("llama", {"window": 5}, "window must be 0 for a Llama"),
        ("deepseek_v3", {"rotary_width": 0}, "rotary_width must be at least 2"),
        ("minimax", {"gate_rank": 3}, "gate_rank must be 0 for a MiniMax"),
    ],
)
def test_layers_that_transformers_does_not_have_are_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        save_attention(build_layer(kind, **options))


def test_a_layer_of_another_class_is_refused() -> None:
    layer = build_layer("llama")
    layer.__class__ = type("Changed", (type(layer),), {})
    with pytest.raises(ConfigError, match=r"a layer to be saved must be one of .*gqa.* but got Changed"):
        save_attention(layer)


def test_a_loaded_layer_learns() -> None:
    for kind in LAYERS:
        layer = load_attention(*save(kind), 1)
        layer(random_activations(1, 5, 32, dtype=torch.float32)).square().mean().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, (kind, name)
            assert float(parameter.grad.abs().max()) > 0, (kind, name)

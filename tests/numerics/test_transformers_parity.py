"""Outputs of our layers with weights of transformers' modules against those of the modules themselves, in float32.

B batch, T new tokens, S tokens so far, D model width, V vocabulary.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hydra.attention.base import AttentionBackend
from hydra.convert import load_attention, load_transformers, save_attention, save_transformers
from hydra.model.framework import HydraModel, generate
from hydra.testing.specs import build_random_layer, build_random_model, random_activations

transformers = pytest.importorskip("transformers", reason="transformers, a development dependency, is not installed")
from transformers.cache_utils import DynamicCache  # noqa: E402
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3  # noqa: E402
from transformers.models.llama import modeling_llama as llama  # noqa: E402
from transformers.models.minimax import modeling_minimax as minimax  # noqa: E402
from transformers.models.zaya import modeling_zaya as zaya  # noqa: E402

MAX_ERROR = 1e-5
"""Largest absolute difference of outputs whose standard deviation is between 0.05 and 5."""
N_LAYERS = 4


@dataclasses.dataclass(frozen=True)
class Family:
    """How transformers' attention of one model_type is built and called."""

    config_class: Any
    module_class: Any
    rotary_class: Any
    sizes: Mapping[str, Any]
    new_cache: Callable[[Any], Any]


def new_dynamic_cache(config: Any) -> Any:
    return DynamicCache(config=config)


FAMILIES = {
    "llama": Family(
        transformers.LlamaConfig,
        llama.LlamaAttention,
        llama.LlamaRotaryEmbedding,
        {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2},
        new_dynamic_cache,
    ),
    "deepseek_v3": Family(
        transformers.DeepseekV3Config,
        deepseek_v3.DeepseekV3Attention,
        deepseek_v3.DeepseekV3RotaryEmbedding,
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "kv_lora_rank": 24,
            "q_lora_rank": 20,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 10,
            "v_head_dim": 12,
        },
        new_dynamic_cache,
    ),
    "zaya": Family(
        transformers.ZayaConfig,
        zaya.ZayaAttention,
        zaya.ZayaRotaryEmbedding,
        {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
        new_dynamic_cache,
    ),
    "minimax": Family(
        transformers.MiniMaxConfig,
        minimax.MiniMaxLightningAttention,
        minimax.MiniMaxRotaryEmbedding,
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "layer_types": ["linear_attention"] * N_LAYERS,
            "block_size": 8,
        },
        lambda config: minimax.MiniMaxCache(),
    ),
}

# Each is one module of transformers: model_type, layer, and fields that differ from the family's.
ZAYA_ROPE = {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama": ("llama", 1, {}),
    "llama multi-head": ("llama", 0, {"num_key_value_heads": 8}),
    "llama multi-query": ("llama", 0, {"num_key_value_heads": 1}),
    "llama base 500": ("llama", 0, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "deepseek_v3": ("deepseek_v3", 1, {}),
    "deepseek_v3 without a latent of queries": ("deepseek_v3", 0, {"q_lora_rank": None}),
    "deepseek_v3 by halves": ("deepseek_v3", 0, {"rope_interleave": False}),
    "deepseek_v3 base 500": ("deepseek_v3", 0, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "zaya": ("zaya", 1, {}),
    "zaya CCA": ("zaya", 0, {"num_attention_heads": 2}),
    "zaya one key head": ("zaya", 0, {"num_key_value_heads": 1}),
    "zaya kernels 3 and 4": ("zaya", 0, {"cca_time0": 3, "cca_time1": 4}),
    "zaya base 300": ("zaya", 0, {"rope_parameters": {"hybrid": ZAYA_ROPE}}),
    "minimax first layer": ("minimax", 0, {}),
    "minimax": ("minimax", 2, {}),
    "minimax last layer": ("minimax", 3, {}),
    "minimax three heads": ("minimax", 1, {"hidden_size": 48, "num_attention_heads": 3}),
}


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Nothing zero, one or symmetric: norms about 1, temperatures between 0.5 and 2.5, biases of 0.3."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("temp"):
            parameter.copy_(0.5 + 2 * torch.rand(parameter.shape, generator=generator))
        elif "norm" in name:
            parameter.copy_(1 + 0.3 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)


class Theirs:
    """A module of transformers with random weights."""

    def __init__(self, case: str) -> None:
        model_type, self.layer_index, changes = CASES[case]
        self.family = FAMILIES[model_type]
        fields = {"num_hidden_layers": N_LAYERS, **self.family.sizes, **changes}
        self.config = self.family.config_class(**fields)
        self.make_module()
        randomise(self.module)

    def make_module(self) -> None:
        self.config._attn_implementation = "eager"
        self.module = self.family.module_class(self.config, self.layer_index).eval()
        self.rotary = self.family.rotary_class(self.config)
        self.cache: Any = None

    @classmethod
    def from_ours(cls, layer: AttentionBackend) -> "Theirs":
        """Their module, of their config and with their state dict, as save_attention gives it."""
        fields, state = save_attention(layer)
        theirs = cls.__new__(cls)
        theirs.layer_index, theirs.family = layer.spec.layer_index, FAMILIES[fields["model_type"]]
        theirs.config = theirs.family.config_class.from_dict(fields)
        theirs.make_module()
        theirs.module.load_state_dict(state, strict=True)
        return theirs

    def start_cache(self) -> None:
        self.cache = self.family.new_cache(self.config)

    @torch.no_grad()
    def __call__(self, x_BTD: Tensor, positions_BT: Tensor, n_past: int = 0) -> Tensor:
        n_tokens = x_BTD.shape[1]
        visible_TS = torch.ones(n_tokens, n_past + n_tokens, dtype=torch.bool).tril(n_past)
        mask: Any = torch.zeros(visible_TS.shape).masked_fill(~visible_TS, -torch.inf)[None, None]
        if self.family.module_class is zaya.ZayaAttention:
            rotary = self.rotary(x_BTD, positions_BT, "hybrid")
            mask = {"causal": mask, "conv": None}
        else:
            rotary = self.rotary(x_BTD, positions_BT)
        if self.family.module_class is minimax.MiniMaxLightningAttention:
            mask = None  # theirs is one of padding
        out = self.module(x_BTD, position_embeddings=rotary, attention_mask=mask, cache=self.cache)
        return out[0]


def positions_of(n_batch: int, start: int, stop: int) -> Tensor:
    return torch.arange(start, stop).expand(n_batch, -1)


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape
    error = float((actual - expected).abs().max())
    assert error <= MAX_ERROR, f"{what}: {error:.2e}"  # a NaN fails


def load(theirs: Theirs) -> AttentionBackend:
    return load_attention(theirs.config.to_dict(), theirs.module.state_dict(), theirs.layer_index)


@pytest.mark.parametrize("scale", [1.0, 0.01], ids=["", "small"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_layer_with_their_weights_computes_what_theirs_does(case: str, scale: float) -> None:
    """Small activations too, so that what is added to a mean square before its root shows."""
    theirs = Theirs(case)
    ours = load(theirs)
    for n_tokens in (1, 2, 3, 7, 50):
        x_BTD = scale * random_activations(2, n_tokens, theirs.config.hidden_size, dtype=torch.float32, seed=n_tokens)
        start = 5 if n_tokens == 7 else 0
        positions_BT = positions_of(2, start, start + n_tokens)
        expected_BTD = theirs(x_BTD, positions_BT)
        if scale == 1.0:
            assert 0.05 < float(expected_BTD.std()) < 5
        assert_same(ours(x_BTD, positions_BT=positions_BT), expected_BTD, f"{n_tokens} tokens")


@pytest.mark.parametrize("n_prompt", [1, 2, 9])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_prefill_and_single_tokens_compute_what_theirs_do(case: str, n_prompt: int) -> None:
    theirs, n_tokens = Theirs(case), 20
    ours = load(theirs)
    x_BTD = random_activations(2, n_tokens, theirs.config.hidden_size, dtype=torch.float32)
    full_BTD = theirs(x_BTD, positions_of(2, 0, n_tokens))
    theirs.start_cache()
    cache = ours.new_cache(2, n_tokens)
    bounds = [0, *range(n_prompt, n_tokens + 1)]
    for start, stop in itertools.pairwise(bounds):
        expected_BTD = theirs(x_BTD[:, start:stop], positions_of(2, start, stop), n_past=start)
        actual_BTD = ours(x_BTD[:, start:stop], cache=cache)
        assert_same(actual_BTD, expected_BTD, f"tokens {start} to {stop} against their cache")
        assert_same(actual_BTD, full_BTD[:, start:stop], f"tokens {start} to {stop} against their whole pass")


OURS: dict[str, dict[str, Any]] = {
    "gqa": {"n_kv_heads": 2, "rope_base": 700.0},
    "mla": {"kv_latent_width": 12, "q_latent_width": 10, "rotary_width": 6, "nope_width": 5, "value_width": 7},
    "mla ": {"q_latent_width": 0, "rope_base": 700.0},
    "ccgqa": {"n_query_heads": 4, "n_kv_heads": 2, "rotary_fraction": 0.5, "rope_base": 700.0, "conv_kernel_0": 3},
    "lightning": {},
}


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_their_module_with_our_weights_computes_what_ours_does(name: str) -> None:
    layer = build_random_layer(name.strip(), 48, 4, torch.float32, layer_index=1, n_layers=3, **OURS[name])
    theirs = Theirs.from_ours(layer)
    x_BTD = random_activations(2, 30, 48, dtype=torch.float32)
    expected_BTD = theirs(x_BTD, positions_of(2, 0, 30))
    assert float(expected_BTD.std()) > 0.005
    assert_same(layer(x_BTD), expected_BTD, name)


@pytest.mark.parametrize("case", CASES)
def test_their_weights_come_back_to_the_bit(case: str) -> None:
    theirs = Theirs(case)
    state = theirs.module.state_dict()
    ours = load(theirs)
    fields, saved = save_attention(ours)
    again = load_attention(fields, saved, theirs.layer_index)
    assert again.spec == ours.spec
    assert saved.keys() == state.keys()
    if case == "deepseek_v3 by halves":  # saved for neighbouring channels, as released weights are
        state, saved = ours.state_dict(), again.state_dict()
    for name, tensor in state.items():
        if not name.endswith("decay"):  # for blocks of 8 tokens there, of 256 here
            assert torch.equal(saved[name], tensor), name


def test_decays_are_written_to_the_bit() -> None:
    fields = {**FAMILIES["minimax"].sizes, "num_hidden_layers": N_LAYERS, "block_size": 256}
    module = minimax.MiniMaxLightningAttention(transformers.MiniMaxConfig(**fields), 2)
    config = transformers.MiniMaxConfig(**fields).to_dict()
    _, saved = save_attention(load_attention(config, module.state_dict(), 2))
    assert all(torch.equal(saved[name], tensor) for name, tensor in module.state_dict().items())


def tiny_llama(**changes: Any) -> Any:
    fields = {
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
        "pad_token_id": None,
        **changes,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    randomise(model)
    return model


def token_ids(n_tokens: int) -> Tensor:
    return torch.randint(61, (2, n_tokens), generator=torch.Generator().manual_seed(n_tokens))


@pytest.mark.parametrize("is_tied", [False, True])
@torch.no_grad()
def test_a_whole_llama_gives_the_same_logits_and_the_same_text(is_tied: bool) -> None:
    theirs = tiny_llama(tie_word_embeddings=is_tied)
    ours = load_transformers(theirs.config.to_dict(), theirs.state_dict())
    for n_tokens in (1, 2, 33):
        inputs_BT = token_ids(n_tokens)
        expected_BTV = theirs(inputs_BT).logits
        assert 0.1 < float(expected_BTV.std()) < 10
        actual_BTV = ours(inputs_BT).logits_BTV
        assert actual_BTV is not None
        assert_same(actual_BTV, expected_BTV, f"{n_tokens} tokens")
    prompt = token_ids(5)[0]
    expected = theirs.generate(
        prompt[None], attention_mask=torch.ones(1, 5), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert [*prompt.tolist(), *generate(ours, prompt.tolist(), 20, temperature=0.0)][-20:] == expected[0, 5:].tolist()


@torch.no_grad()
def test_a_whole_llama_decodes_as_theirs_does() -> None:
    theirs = tiny_llama()
    ours = load_transformers(theirs.config.to_dict(), theirs.state_dict())
    inputs_BT, their_cache, cache = token_ids(24), DynamicCache(config=theirs.config), ours.new_cache(2, 24)
    bounds = [0, *range(7, 25)]
    for start, stop in itertools.pairwise(bounds):
        expected_BTV = theirs(inputs_BT[:, start:stop], cache=their_cache, use_cache=True).logits
        actual_BTV = ours(inputs_BT[:, start:stop], cache=cache).logits_BTV
        assert actual_BTV is not None
        assert_same(actual_BTV, expected_BTV, f"tokens {start} to {stop}")


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_whole_llama_comes_back_to_the_bit(is_tied: bool) -> None:
    theirs = tiny_llama(tie_word_embeddings=is_tied)
    config, state = save_transformers(load_transformers(theirs.config.to_dict(), theirs.state_dict()))
    known = theirs.config.to_dict()
    assert {name: known[name] for name in config if name not in ("architectures", "dtype")} == {
        name: value for name, value in config.items() if name not in ("architectures", "dtype")
    }
    expected = {name: tensor for name, tensor in theirs.state_dict().items() if not is_tied or name != "lm_head.weight"}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("is_tied", [False, True])
@torch.no_grad()
def test_a_model_of_ours_is_a_llama_of_theirs(is_tied: bool) -> None:
    options = {"n_kv_heads": 2, "rope_base": 700.0}
    ours: HydraModel = build_random_model(
        torch.float32, tie_embeddings=is_tied, n_layers=3, attention_options=options, norm_eps=1e-2
    )
    config, state = save_transformers(ours)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config)).eval()
    if is_tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state, strict=True)
    inputs_BT = token_ids(20)
    actual_BTV = ours(inputs_BT).logits_BTV
    assert actual_BTV is not None
    assert_same(actual_BTV, theirs(inputs_BT).logits, "logits")

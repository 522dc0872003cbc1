"""A researcher's class where a backend stands: caches, costs, first values, decoding, compiled code."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hydra.attention import build_attention
from hydra.attention.base import AttentionBackend
from hydra.attention.custom import fit_quadratic
from hydra.errors import ConfigError
from hydra.model.framework import Decoder, build_model, generate, quantise_int8
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401
from hydra.testing.specs import build_random_layer, document_ids, random_activations, randomise, tiny_model_spec
from hydra.testing.tolerances import assert_close

EXAMPLES = Path(__file__).parents[3] / "notebooks" / "examples" / "attention_classes"
CLASSES = ("sigmoid.py:SigmoidAttention", "gated_recurrence.py:GatedRecurrence", "convolution.py:ConvolutionMixer")
PLAN = ", ".join(f"{EXAMPLES}/{name}" for name in CLASSES)

HEAD = "import torch\nfrom torch import nn\nclass Mine(nn.Module):\n    def __init__(self, spec):\n"
TAIL = "    def forward(self, x_BTD, positions_BT, document_ids_BT):\n        return x_BTD\n"


def build(name: str, dtype: torch.dtype = torch.float64) -> AttentionBackend:
    return build_random_layer(f"{EXAMPLES}/{name}", 32, 4, dtype)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("split", [(11,), (1,) * 11, (7, 1, 1, 2), (1, 10)], ids=str)
@pytest.mark.parametrize("is_packed", [False, True])
@torch.no_grad()
def test_any_split_of_prefill_and_decode(
    name: str,
    split: tuple[int, ...],
    is_packed: bool,
    nan_poisoned_memory: None,  # noqa: F811
) -> None:
    layer, x_BTD = build(name), random_activations(2, 11, 32)
    ids_BT = torch.cat([document_ids(4, 1, 6), document_ids(7, 4)]) if is_packed else None
    cache = layer.new_cache(2, 20)
    pieces, start = [], 0
    for length in split:
        ids = None if ids_BT is None else ids_BT[:, start : start + length]
        pieces.append(layer(x_BTD[:, start : start + length], cache=cache, document_ids_BT=ids))
        start += length
    assert_close(torch.cat(pieces, dim=1), layer(x_BTD, document_ids_BT=ids_BT), torch.float64, "outputs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_recompute_cache_says_what_it_takes(dtype: torch.dtype) -> None:
    layer = build(CLASSES[0], dtype)
    cache = layer.new_cache(3, 10)
    tensors: list[Tensor] = cache.token_tensors()
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 30 * layer.kv_bytes_per_token
    assert (layer.constant_state_bytes, cache.state_tensors()) == (0, [])
    assert layer.kv_bytes_per_token == 32 * dtype.itemsize + 8
    assert type(cache).__name__ == "RecomputeCache"


def test_flops_are_those_of_the_products() -> None:
    for n_tokens in (1, 100, 4096):
        assert build(CLASSES[0]).flops(n_tokens) == 2 * 4 * 32 * 32 * n_tokens + 4 * 32 * n_tokens**2
        assert build(CLASSES[1]).flops(n_tokens) == 2 * 4 * 32 * 32 * n_tokens
    assert fit_quadratic({3: 3 * 7 + 9 * 2, 5: 5 * 7 + 25 * 2, 9: 9 * 7 + 81 * 2}) == pytest.approx((7, 2))


def test_decoding_gives_what_generate_gives(tmp_path: Path) -> None:
    """Also with a class that finds out from positions what is earlier."""
    (tmp_path / "mine.py").write_text(
        HEAD
        + "        super().__init__()\n"
        + "        self.proj = nn.Linear(spec.d_model, spec.d_model)\n"
        + "    def forward(self, x_BTD, positions_BT, document_ids_BT):\n"
        + "        is_past_BTS = positions_BT[:, :, None] >= positions_BT[:, None, :]\n"
        + "        weights_BTS = is_past_BTS / is_past_BTS.sum(-1, keepdim=True)\n"
        + "        return 20 * weights_BTS.to(x_BTD.dtype) @ self.proj(x_BTD)\n"
    )
    model = build_model(tiny_model_spec(attention=f"{PLAN}, gqa, {tmp_path}/mine.py:Mine", n_layers=5))
    randomise(model)
    prompts = [[1, 2, 3, 4, 5], [7, 8]]
    expected = [generate(model, prompt, 9, temperature=0.0) for prompt in prompts]
    for implementation in ("reference", "compiled"):
        decoder = Decoder(model, max_tokens=24, n_streams=2, implementation=implementation)
        assert decoder.generate(prompts, 9, temperature=0.0) == expected, implementation


def test_its_matrices_are_not_rounded_to_8_bits() -> None:
    model = build_model(tiny_model_spec(attention=f"{PLAN}, gqa", n_layers=4))
    tokens_BT = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(0))
    int8 = quantise_int8(model, [(tokens_BT[:, :-1], tokens_BT[:, 1:])])
    assert not any(".custom." in name for name in int8.matrices)
    assert "blocks.3.attention.q_proj" in int8.matrices


def test_compiled_blocks_compute_the_same() -> None:
    model = build_model(tiny_model_spec(attention=PLAN, n_layers=3))
    randomise(model)
    inputs_BT = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(0))
    ids_BT = document_ids(9, 8).expand(2, -1)
    expected = model(inputs_BT, document_ids_BT=ids_BT).logits_BTV
    model.compile_regions()  # graph breaks are errors
    assert_close(model(inputs_BT, document_ids_BT=ids_BT).logits_BTV, expected, torch.float32, "logits")


def test_first_values(tmp_path: Path) -> None:
    """Torch's layers as the house has them, own parameters as __init__ has them, reset_parameters last; by seed."""
    path = tmp_path / "mine.py"
    path.write_text(
        HEAD
        + "        super().__init__()\n"
        + "        self.o_proj = nn.Linear(spec.d_model, spec.d_model)\n"
        + "        self.v_proj = nn.Linear(spec.d_model, 4 * spec.d_model)\n"
        + "        self.norm = nn.RMSNorm(spec.d_model)\n"
        + "        self.decay = nn.Parameter(torch.linspace(-1, 1, spec.d_model))\n"
        + "        self.noise = nn.Parameter(torch.rand(spec.d_model))\n"
        + TAIL
        + "class Resets(Mine):\n    def reset_parameters(self):\n        self.decay.fill_(3.0)\n"
    )
    state = torch.get_rng_state()
    model = build_model(tiny_model_spec(attention=f"{path}:Mine, {path}:Resets", zero_init=True))
    assert torch.equal(torch.get_rng_state(), state)
    mine, resets = (block.attention.custom for block in model.blocks)
    assert mine.o_proj.weight.abs().max() == mine.o_proj.bias.abs().max() == 0
    assert float(mine.v_proj.weight.std()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(mine.norm.weight, torch.ones(32))
    assert torch.equal(mine.decay, torch.linspace(-1, 1, 32))
    assert torch.equal(resets.decay, torch.full((32,), 3.0))
    assert not torch.equal(mine.noise, resets.noise)
    again, other = (build_model(model.spec, seed=seed).blocks[0].attention.custom for seed in (0, 1))
    assert torch.equal(again.noise, mine.noise)
    assert not torch.equal(other.noise, mine.noise)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("self.mask = torch.ones(3)", "holds? no values but parameters, but .* keeps the tensor 'mask'"),
        ("self.register_buffer('mask', torch.ones(3))", "keeps the tensor 'mask'"),
        ("self.inner = nn.BatchNorm1d(3)", "keeps the tensor 'inner.running_mean'"),
        ("pass", "must have parameters, but .* has none"),
    ],
)
def test_what_a_layer_may_not_hold(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(f"{HEAD}        super().__init__()\n        {body}\n{TAIL}")
    with pytest.raises(ConfigError, match=message):
        build_attention(f"{tmp_path}/mine.py:Mine", d_model=32, n_heads=4)

"""A model that asks for Triton's kernels is served by them, eager and compiled, and computes the same."""

import subprocess
import sys
from collections import Counter

import pytest
import torch

from hydra.attention import available_backends
from hydra.errors import ConfigError
from hydra.kernels.dispatch import check_kernels, choose_kernels
from hydra.model.framework import Execution, HydraModel, build_model
from hydra.testing.operators import CountedOperators
from hydra.testing.specs import document_ids, randomise, tiny_model_spec
from hydra.testing.tolerances import assert_close

INPUTS_BT = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(0))
TARGETS_BT = INPUTS_BT.roll(-1, dims=1)
IDS_BT = torch.cat([document_ids(8, 11), document_ids(19)])
N_LAYERS = 2
ATTENTION_OPERATORS = {
    "ccgqa": {"qk_norm_rope": 2, "cca_convolution": 1},
    "gqa": {"qk_norm_rope": 2},
    "lightning": {"lightning_attention": 1},
    "mla": {"qk_norm_rope": 2},
}
"""How often a layer of each backend calls which operators: queries and keys are normalised in two calls."""
NORMS_INSIDE = {"ccgqa": 0, "gqa": 0, "lightning": 1, "mla": 1}


def build(attention: str, kernels: str, feed_forward: str = "swiglu") -> HydraModel:
    spec = tiny_model_spec(attention=attention, feed_forward=feed_forward, n_layers=N_LAYERS)
    model = build_model(spec, execution=Execution(kernels=kernels))
    randomise(model)
    return model


def loss_and_gradients(model: HydraModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(INPUTS_BT, TARGETS_BT, IDS_BT).losses["cross_entropy"]
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("feed_forward", ["swiglu", "squared_relu"])
@pytest.mark.parametrize("attention", available_backends())
def test_the_kernels_serve_a_model(attention: str, feed_forward: str) -> None:
    # Against float64: two ways in float32 may each be off by what one of them may.
    expected_loss, expected = loss_and_gradients(build(attention, "torch", feed_forward).double())
    with CountedOperators() as operators:
        loss, gradients = loss_and_gradients(build(attention, "triton", feed_forward))
    for name in ("rms_norm", "rms_norm_backward"):
        assert operators.counts[name] == (2 + NORMS_INSIDE[attention]) * N_LAYERS + 1
    for name, n_calls in {**ATTENTION_OPERATORS[attention], "linear_cross_entropy": 1 / N_LAYERS}.items():
        assert operators.counts[name] == n_calls * N_LAYERS
        assert operators.counts[f"{name}_backward"] == (n_calls * N_LAYERS if name != "linear_cross_entropy" else 0)
    for name in (feed_forward, f"{feed_forward}_backward"):
        assert operators.counts[name] == N_LAYERS
    assert_close(loss, expected_loss, torch.float32, "loss")
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], torch.float32, name)


@pytest.mark.parametrize("attention", available_backends())
def test_torchs_own_are_served_otherwise(attention: str) -> None:
    with CountedOperators() as operators:
        loss_and_gradients(build(attention, "torch"))
    assert not operators.counts


def test_a_compiled_model_stays_in_one_graph_for_each_region() -> None:
    """compile_regions makes graph breaks errors. The operators are seen where the compiled code runs."""
    torch.compiler.reset()
    expected_loss, expected = loss_and_gradients(build("gqa", "torch"))
    model = build("gqa", "triton")
    model.compile_regions()
    with torch.profiler.profile() as profile:
        loss, gradients = loss_and_gradients(model)
    counts = Counter(event.name for event in profile.events())
    assert counts["hydra::rms_norm"] >= 2 * N_LAYERS + 1
    assert counts["hydra::swiglu_backward"] >= N_LAYERS
    assert_close(loss, expected_loss, torch.float32, "loss")
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], torch.float32, name)


def test_auto_is_for_gpus() -> None:
    for is_compiled, has_linear_attention, expected in (
        (False, False, "triton"),
        (False, True, "triton"),
        (True, False, "torch"),
        (True, True, "triton"),
    ):
        chosen = {
            device: choose_kernels(device, is_compiled=is_compiled, has_linear_attention=has_linear_attention)[0]
            for device in ("cpu", "cuda")
        }
        assert chosen == {"cpu": "torch", "cuda": expected}


def test_an_unknown_implementation_is_named() -> None:
    with pytest.raises(ConfigError, match="torch, triton, but got kernels='cuda'"):
        check_kernels("cuda", "cuda")
    with pytest.raises(ConfigError, match="triton"):
        Execution(kernels="tritn")


@pytest.mark.parametrize(
    ("before", "message"),
    [("", "kernels=triton must have a GPU"), ("import sys; sys.modules['triton'] = None", "triton must be installed")],
)
def test_what_cannot_be_had_is_an_error(before: str, message: str) -> None:
    """In a process without the interpreter."""
    code = (
        f"{before}\n"
        "from hydra.model.framework import Execution, build_model\n"
        "from hydra.testing.specs import tiny_model_spec\n"
        "build_model(tiny_model_spec(), execution=Execution(kernels='triton'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ConfigError" in done.stderr
    assert message in done.stderr

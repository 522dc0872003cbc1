"""The compiled, blocked, bfloat16 path of a whole model against the eager float32 one, and how often it compiles."""

import pytest
import torch
from torch._dynamo.utils import counters

from hydra.attention import available_backends
from hydra.model.framework import Execution, HydraModel, build_model
from hydra.optim import MasterWeights, build_optimizers, set_learning_rate
from hydra.testing.specs import document_ids, randomise, tiny_model_spec
from hydra.testing.tolerances import assert_close
from scripts.config import TrainingConfig
from scripts.evaluation import as_written

INPUTS_BT = torch.randint(61, (2, 70), generator=torch.Generator().manual_seed(0))
TARGETS_BT = INPUTS_BT.roll(-1, dims=1)
IDS_BT = torch.cat([document_ids(30, 40), document_ids(70)])
pytestmark = pytest.mark.parametrize("attention", available_backends())


def build(attention: str, **execution: str) -> HydraModel:
    spec = tiny_model_spec(attention=attention, feed_forward="squared_relu", tie_embeddings=False)
    model = build_model(spec, execution=Execution(**execution))
    randomise(model)
    return model


def loss_and_gradients(model: HydraModel, masters: MasterWeights) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(INPUTS_BT, TARGETS_BT, IDS_BT).losses["cross_entropy"]
    loss.backward()
    gradients = {}
    for name, parameter in masters.named.items():
        assert parameter.grad is not None, name
        gradients[name], parameter.grad = parameter.grad, None
    return loss.detach(), gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_computes_what_the_eager_one_computes(attention: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    slow, fast = build(attention), build(attention, attention_kernel="blocked")
    expected_loss, expected = loss_and_gradients(slow, MasterWeights(slow, torch.float32, frozenset()))
    masters = MasterWeights(fast, dtype, fast.lookup_names())
    fast.compile_regions()
    loss, gradients = loss_and_gradients(fast, masters)
    assert_close(loss, expected_loss, dtype, "loss")
    assert gradients.keys() == expected.keys()
    if dtype == torch.float32:
        for name, gradient in gradients.items():
            assert_close(gradient, expected[name], dtype, name)
    else:
        # Rounding of a tiny model's few numbers is large for single vectors; over all parameters it is not.
        flat, expected_flat = (torch.cat([g.flatten() for g in gs.values()]) for gs in (gradients, expected))
        assert ((flat - expected_flat).norm() / expected_flat.norm()).item() < 0.05


def test_no_graph_breaks_and_no_recompilation_after_the_first_step_of_a_shape(attention: str) -> None:
    torch.compiler.reset()
    counters.clear()
    model = build(attention, attention_kernel="blocked")
    masters = MasterWeights(model, torch.bfloat16, model.lookup_names())
    model.compile_regions()
    config = TrainingConfig.preset("tiny", optimizer="muon")
    optimizers = build_optimizers(masters.named, config.optimizer_spec(), torch.bfloat16)

    def train_and_evaluate() -> None:
        _, gradients = loss_and_gradients(model, masters)
        for name, gradient in gradients.items():
            masters.named[name].grad = gradient
        for optimizer in optimizers:
            set_learning_rate(optimizer, 0.5)
            optimizer.step()
            optimizer.zero_grad()
        masters.publish()
        model.eval()
        with torch.no_grad(), as_written(model):
            model(INPUTS_BT, TARGETS_BT, IDS_BT)
        model.train()

    train_and_evaluate()
    compiled = counters["stats"]["unique_graphs"]
    # Block, last norm, and the pointwise part of the loss.
    assert compiled == 3
    IDS_BT.copy_(IDS_BT.roll(1, dims=0))  # values of the same shape
    for _ in range(3):
        train_and_evaluate()
    assert counters["stats"]["unique_graphs"] == compiled
    assert not counters["graph_break"]


def test_generation_does_not_go_through_compiled_code(attention: str) -> None:
    """Its shapes change with every token."""
    model = build(attention)
    model.compile_regions()
    counters.clear()
    cache = model.new_cache(2, 7)
    with torch.no_grad():
        expected = model(INPUTS_BT[:, :7]).logits_BTV
        counters.clear()
        pieces = [model(INPUTS_BT[:, t : t + 1], cache=cache).logits_BTV for t in range(7)]
    assert not counters["stats"]
    assert expected is not None
    assert_close(torch.cat(pieces, dim=1), expected, torch.float32, "logits")

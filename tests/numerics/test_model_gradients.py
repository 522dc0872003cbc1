"""Derivatives of whole models: against differences of the loss, and in float32 against float64."""

import pytest
import torch

from hydra.attention import available_backends
from hydra.model.framework import HydraModel
from hydra.testing.poison import nan_poisoned_memory  # noqa: F401
from hydra.testing.specs import build_random_model, document_ids
from hydra.testing.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("nan_poisoned_memory")

INPUTS_BT = torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(0))
TARGETS_BT = INPUTS_BT.roll(-1, dims=1)
IDS_BT = torch.cat([document_ids(3, 1, 7), document_ids(11)])


def compute_loss(model: HydraModel) -> torch.Tensor:
    return model(INPUTS_BT, TARGETS_BT, IDS_BT).losses["cross_entropy"]


@pytest.mark.parametrize("attention", available_backends())
def test_gradient_is_the_slope_of_the_loss(attention: str) -> None:
    """For every parameter, along a random direction: central differences in float64."""
    model = build_random_model(attention=attention, feed_forward="squared_relu", tie_embeddings=False)
    compute_loss(model).backward()
    generator = torch.Generator().manual_seed(1)
    step = 1e-5
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        slope = (parameter.grad * direction).sum().item()
        losses = []
        with torch.no_grad():
            for factor in (step, -2 * step):
                parameter += factor * direction
                losses.append(compute_loss(model).item())
            parameter += step * direction
        measured = (losses[0] - losses[1]) / (2 * step)
        assert measured == pytest.approx(slope, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("attention", available_backends())
def test_float32_follows_float64(attention: str) -> None:
    single, double = build_random_model(torch.float32, attention=attention), build_random_model(attention=attention)
    double.load_state_dict(single.state_dict())
    losses = [compute_loss(model) for model in (single, double)]
    for loss in losses:
        loss.backward()
    assert_close(*losses, torch.float32, "losses")
    for (name, ours), theirs in zip(single.named_parameters(), double.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert_close(ours.grad, theirs.grad, torch.float32, name)

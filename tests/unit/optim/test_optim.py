"""Schedules at their corners, each parameter in one group and stepped once, masters that lose nothing."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hydra.errors import CheckpointError
from hydra.optim import (
    AdamW,
    MasterWeights,
    OptimizerSpec,
    build_optimizers,
    cosine,
    group_parameters,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    state_bytes,
    warmup_stable_decay,
)
from hydra.optim.muon import Muon, orthogonalise


def test_warmup_stable_decay_corners() -> None:
    shape = {"max_steps": 100, "warmup_steps": 9, "decay_fraction": 0.4, "final_fraction": 0.1}
    rate = [warmup_stable_decay(step, **shape) for step in range(101)]
    assert rate[0] == pytest.approx(0.1)
    assert rate[9] == 1.0
    assert rate[10:61] == [1.0] * 51
    assert rate[61] < 1.0
    assert rate[100] == pytest.approx(0.1)
    falls = [before - after for before, after in itertools.pairwise(rate[60:])]
    assert falls == pytest.approx([0.9 / 40] * 40)


def test_no_decay_and_no_warmup() -> None:
    shape = {"max_steps": 10, "warmup_steps": 0, "decay_fraction": 0.0, "final_fraction": 0.0}
    assert [warmup_stable_decay(step, **shape) for step in range(10)] == [1.0] * 10


def test_a_run_shorter_than_warmup_and_fall_together() -> None:
    shape = {"max_steps": 10, "warmup_steps": 9, "decay_fraction": 0.5, "final_fraction": 0.0}
    rate = [warmup_stable_decay(step, **shape) for step in range(10)]
    assert rate[4:] == pytest.approx([0.5, 0.6, 0.7 * 0.8, 0.8 * 0.6, 0.9 * 0.4, 0.2])


def test_cosine_corners() -> None:
    shape = {"max_steps": 110, "warmup_steps": 10, "final_fraction": 0.1}
    assert cosine(10, **shape) == 1.0
    assert cosine(60, **shape) == pytest.approx(0.55)
    assert cosine(110, **shape) == pytest.approx(0.1)
    assert cosine(0, **shape) == pytest.approx(1 / 11)


def tiny_model() -> nn.Module:
    model = nn.Module()
    model.embedding = nn.Embedding(7, 4)
    model.blocks = nn.ModuleList([nn.Linear(4, 8), nn.Conv1d(4, 4, 2), nn.Linear(8, 4, bias=False)])
    model.head = nn.Linear(4, 7, bias=False)
    return model


def spec(kind: str, adam_state: str = "float32") -> OptimizerSpec:
    return OptimizerSpec(
        kind=kind,
        adam_state=adam_state,
        learning_rate=1e-2,
        weight_decay=0.1,
        adam_betas=(0.9, 0.95),
        adam_eps=1e-8,
        muon_learning_rate=2e-2,
        muon_momentum=0.95,
        muon_weight_decay=0.01,
    )


def backward(model: nn.Module, seed: int) -> None:
    """Give every parameter a gradient, the same for the same seed, through a loss that uses all of them."""
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        (parameter.float() * torch.randn(parameter.shape, generator=generator)).sum()
        for _, parameter in sorted(model.named_parameters())
    )
    assert isinstance(loss, torch.Tensor)
    loss.backward()


def test_each_parameter_is_in_exactly_one_group() -> None:
    model = tiny_model()
    groups = group_parameters(dict(model.named_parameters()))
    assert set(groups.hidden) == {"blocks.0.weight", "blocks.2.weight"}
    assert set(groups.tables) == {"embedding.weight", "head.weight", "blocks.1.weight"}
    assert set(groups.vectors) == {"blocks.0.bias", "blocks.1.bias"}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizers_step_each_parameter_once(kind: str) -> None:
    model = tiny_model()
    optimizers = build_optimizers(dict(model.named_parameters()), spec(kind), torch.float32)
    grouped = [
        parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    ]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    by_class = {type(optimizer): optimizer for optimizer in optimizers}
    assert set(by_class) == ({AdamW} if kind == "adamw" else {AdamW, Muon})
    for group in by_class[AdamW].param_groups:
        assert group["peak_lr"] == 1e-2
        assert {parameter.ndim >= 2 for parameter in group["params"]} == {group["weight_decay"] == 0.1}
    if kind == "muon":
        (hidden,) = by_class[Muon].param_groups
        assert (hidden["peak_lr"], hidden["weight_decay"], hidden["momentum"]) == (2e-2, 0.01, 0.95)


def test_a_step_does_not_import_the_compiler() -> None:
    """It takes a second, as long as importing torch, and a run that begins without it begins that much sooner."""
    program = """
import sys, torch
from hydra.model.framework import build_model
from hydra.optim import MasterWeights, build_optimizers
from hydra.testing.specs import tiny_model_spec
from tests.unit.optim.test_optim import spec
model = build_model(tiny_model_spec())
masters = MasterWeights(model, torch.bfloat16, model.lookup_names())
optimizers = build_optimizers(masters.named, spec("muon"), torch.bfloat16)
ids_BT = torch.zeros(2, 8, dtype=torch.int64)
model(ids_BT, ids_BT).losses["cross_entropy"].backward()
for optimizer in optimizers:
    optimizer.step()
    optimizer.zero_grad()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[3])


def test_muon_moves_every_direction_alike() -> None:
    """Jordan et al. 2024: the update is the gradient with its singular values drawn to 1."""
    model = tiny_model()
    optimizers = build_optimizers(dict(model.named_parameters()), spec("muon"), torch.float32)
    before = model.blocks[2].weight.detach().clone()
    model.blocks[2].weight.grad = torch.diag(torch.tensor([9.0, 3.0, 1.0, 0.5])) @ torch.eye(4, 8)
    for optimizer in optimizers:
        optimizer.step()
    update = (before * (1 - 2e-2 * 0.01) - model.blocks[2].weight.detach()) / 2e-2
    singular_values = torch.linalg.svdvals(update)
    assert singular_values.min() > 0.6
    assert singular_values.max() < 1.3


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_is_torchs_muon_in_batches(weight_decay: float) -> None:
    """Several steps of matrices of several shapes, tall ones among them; both orthogonalise in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 16), (16, 8), (16, 16), (8, 16), (4, 16)]
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    fast = Muon(ours, lr=0.02, momentum=0.9, weight_decay=weight_decay, dtype=torch.bfloat16)
    slow = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=weight_decay)
    for _ in range(4):
        for our, their in zip(ours, theirs, strict=True):
            our.grad = torch.randn(our.shape, generator=generator)
            their.grad = our.grad.clone()
        fast.step()
        slow.step()
    for our, their in zip(ours, theirs, strict=True):
        # An update has entries of about lr / sqrt(columns); bfloat16 rounds five products of each in another order.
        assert (our - their).abs().max() < 4 * 0.02 * 0.05


def test_orthogonalise_is_the_polar_factor_to_within_its_quintic() -> None:
    x_MRC = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(x_MRC, full_matrices=False)
    ours = orthogonalise(x_MRC)
    aligned = left.transpose(1, 2) @ ours @ right.transpose(1, 2)
    diagonal = aligned.diagonal(dim1=1, dim2=2)
    assert (aligned - torch.diag_embed(diagonal)).abs().max() < 1e-10
    assert diagonal.min() > 0.6
    assert diagonal.max() < 1.3


def test_optimizer_state_goes_round_and_must_fit() -> None:
    def build() -> tuple[dict[str, nn.Parameter], list[torch.optim.Optimizer]]:
        model = tiny_model()
        named = dict(model.named_parameters())
        optimizers = build_optimizers(named, spec("muon"), torch.float32)
        return named, optimizers

    named, optimizers = build()
    for seed in range(3):
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        for optimizer in optimizers:
            optimizer.step()
    tensors = optimizer_tensors(named, optimizers)
    assert "blocks.0.weight/momentum_buffer" in tensors
    assert "head.weight/exp_avg_sq" in tensors
    others = build()
    load_optimizer_tensors(*others, tensors)
    other_tensors = optimizer_tensors(*others)
    assert other_tensors.keys() == tensors.keys()
    assert all(torch.equal(other_tensors[key], tensor) for key, tensor in tensors.items())
    incomplete = {key: tensor for key, tensor in tensors.items() if key != "head.weight/exp_avg"}
    for wrong in (incomplete, {**tensors, "other.weight/exp_avg": torch.ones(1)}):
        with pytest.raises(CheckpointError, match="names do not"):
            load_optimizer_tensors(*build(), wrong)


def test_masters_on_the_host_give_the_same_weights() -> None:
    """Here the host is where the model is; what moves between the two is copied, and nothing else may change."""

    def train(on_host: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = tiny_model()
        masters = MasterWeights(model, dtype, frozenset({"embedding.weight"}), on_host=on_host)
        assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in masters.named.values())
        assert (masters.named["embedding.weight"] is model.embedding.weight) is not on_host
        optimizers = build_optimizers(masters.named, spec("muon"), torch.float32)
        for seed in range(3):
            backward(model, 2 * seed)
            backward(model, 2 * seed + 1)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            masters.publish()
        assert all(torch.equal(p, masters.named[n].to(p.dtype)) for n, p in model.named_parameters())
        return masters.state_dict()

    for dtype in (torch.float32, torch.bfloat16):
        here, there = train(False, dtype), train(True, dtype)
        assert all(torch.equal(here[name], there[name]) for name in here)


def eight_bit_model() -> nn.Module:
    """A table whose state is kept in 8 bits (4096 numbers or more, whole blocks of 256), and one that is too small."""
    model = nn.Module()
    model.embedding = nn.Embedding(64, 128)
    model.head = nn.Linear(12, 8)
    return model


def test_adamw_with_8_bit_state_follows_adamw_and_goes_round() -> None:
    def build(adam_state: str) -> tuple[dict[str, nn.Parameter], list[torch.optim.Optimizer]]:
        torch.manual_seed(0)
        named = dict(eight_bit_model().named_parameters())
        return named, build_optimizers(named, spec("adamw", adam_state), torch.float32)

    def step(named: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            set_learning_rate(optimizer, 0.5 + 0.1 * seed)
            optimizer.step()

    exact, ours = build("float32"), build("8bit")
    before = exact[0]["embedding.weight"].detach().clone()
    for seed in range(4):
        step(*exact, seed)
        step(*ours, seed)
    moved = (exact[0]["embedding.weight"] - before).norm()
    assert (exact[0]["embedding.weight"] - ours[0]["embedding.weight"]).norm() < 0.05 * moved
    assert torch.allclose(exact[0]["head.weight"], ours[0]["head.weight"], rtol=0, atol=1e-6)

    tensors = optimizer_tensors(*ours)
    assert tensors["embedding.weight/exp_avg/codes"].dtype == torch.uint8
    assert tensors["head.weight/exp_avg"].dtype == torch.float32
    n_bytes = sum(t.nbytes for key, t in tensors.items() if key.startswith("embedding.weight/exp_avg"))
    assert n_bytes < 2.3 * 64 * 128
    again = build("8bit")
    with torch.no_grad():
        for name, parameter in again[0].items():
            parameter.copy_(ours[0][name])
    load_optimizer_tensors(*again, {key: tensor.clone() for key, tensor in tensors.items()})
    for named_and_optimizers in (ours, again):
        step(*named_and_optimizers, 9)
    assert all(torch.equal(parameter, again[0][name]) for name, parameter in ours[0].items())
    with pytest.raises(CheckpointError, match="must be whole"):
        load_optimizer_tensors(*again, {k: t for k, t in tensors.items() if k != "embedding.weight/exp_avg/scale"})


@pytest.mark.parametrize("adam_state", ["float32", "8bit"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_their_state_takes_is_known_before_a_step(kind: str, adam_state: str) -> None:
    model = nn.Module()
    model.embedding = nn.Embedding(640, 128)
    model.blocks = nn.ModuleList([nn.Linear(96, 128), nn.Linear(12, 8)])
    named = dict(model.named_parameters())
    optimizers = build_optimizers(named, spec(kind, adam_state), torch.float32)
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    tensors = optimizer_tensors(named, optimizers)
    n_bytes = sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith("/step"))
    assert state_bytes(named, spec(kind, adam_state)) == n_bytes


def test_masters_keep_what_bfloat16_would_lose() -> None:
    model = tiny_model()
    exact = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    masters = MasterWeights(model, torch.bfloat16, frozenset({"embedding.weight"}))
    assert {name for name, p in model.named_parameters() if p.dtype == torch.float32} == {"embedding.weight"}
    assert masters.named["embedding.weight"] is model.embedding.weight
    assert all(torch.equal(tensor, exact[name]) for name, tensor in masters.state_dict().items())
    # An update far below bfloat16's resolution of a weight of 1, many times over.
    with torch.no_grad():
        masters.named["head.weight"].fill_(1.0)
        for _ in range(1000):
            masters.named["head.weight"] += 1e-4
        masters.publish()
    assert model.head.weight.dtype == torch.bfloat16
    assert model.head.weight[0, 0].item() == pytest.approx(1.1, rel=2**-8)
    other = MasterWeights(tiny_model(), torch.bfloat16, frozenset({"embedding.weight"}))
    other.load_state_dict(masters.state_dict())
    assert all(torch.equal(other.named[name], tensor) for name, tensor in masters.state_dict().items())


def test_gradients_of_micro_batches_add_up_in_float32() -> None:
    model, reference = tiny_model(), tiny_model()
    masters = MasterWeights(model, torch.bfloat16, frozenset())
    for seed in range(8):
        backward(model, seed)
        assert all(parameter.grad is None for parameter in model.parameters())
        backward(reference, seed)
    for name, parameter in reference.named_parameters():
        grad = masters.named[name].grad
        assert grad is not None
        assert grad.dtype == torch.float32
        # Each addend is rounded to bfloat16 once, its sum is not.
        assert (grad - parameter.grad).abs().max() < 8 * 4.0 * 2**-9, name


def test_float32_parameters_are_their_own_masters() -> None:
    model = tiny_model()
    masters = MasterWeights(model, torch.float32, frozenset())
    assert all(masters.named[name] is parameter for name, parameter in model.named_parameters())

"""Rehearsals against counts by hand and against real memory; the ladder; the model of the heap."""

import itertools
import random

import pytest
import torch
from torch import nn

from hydra.runtime.memory.allocator import MMAP_THRESHOLD, Heap
from hydra.runtime.memory.compiled import StandIn, map_tensors, trace_region
from hydra.runtime.memory.plan import MemoryPlan, Prediction, Rung, build_ladder, find_rung, predict
from hydra.runtime.memory.tracker import Rehearsal, peak_by_kind

KIB = 1024


def test_kinds_of_one_step_by_hand() -> None:
    rehearsal = Rehearsal()
    with rehearsal.running():
        weight = nn.Parameter(torch.empty(256, 256))  # 256 KiB
        state = []
        for _ in range(2):
            rehearsal.begin("forward")
            x = torch.empty(1024, 256)  # 1 MiB, which the backward pass needs
            loss = (x @ weight).sum()  # 1 MiB that is dropped at once
            del x
            loss.backward()
            rehearsal.begin("optimizer")
            if not state:
                state.append(torch.empty_like(weight))
            weight.grad = None
    kinds = peak_by_kind(rehearsal.blocks)
    assert kinds["parameters"] == 256 * KIB
    assert kinds["optimizer"] == 256 * KIB
    assert kinds["activations"] + kinds["temporaries"] == pytest.approx(2048 * KIB, abs=KIB)
    assert kinds["gradients"] in (0, 256 * KIB)


def test_a_rehearsal_counts_what_real_tensors_take() -> None:
    """The same code on real memory: the bytes of all live storages, moment by moment."""

    def step() -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):
            model(torch.zeros(32, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    fake, real = Rehearsal(), Rehearsal()
    with fake.running():
        step()
    with real:
        step()
    assert sum(peak_by_kind(fake.blocks).values()) == sum(peak_by_kind(real.blocks).values())


def test_numbers_asked_of_tensors_without_values() -> None:
    with Rehearsal().running():
        assert float(torch.empty(3).sum()) == 1.0


def test_a_compiled_region_keeps_less_and_its_stand_in_allocates_it() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)).square())

    def peak(is_compiled: bool) -> int:
        rehearsal = Rehearsal()
        with rehearsal.running():
            layers = [Layer() for _ in range(4)]
            x = torch.empty(512, 64, requires_grad=True)
            if is_compiled:
                with rehearsal.paused():
                    region = trace_region(layers[0], [x], 1.0)
            rehearsal.begin("forward")
            y = x
            for layer in layers:
                y = StandIn.apply(region, y, *layer.parameters(), y) if is_compiled else layer(y)
            y.sum().backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for layer in layers for p in layer.parameters())
        return sum(peak_by_kind(rehearsal.blocks).values())

    eager, compiled = peak(False), peak(True)
    assert compiled < eager
    # Four times: the input, and one of up's results; more for what is at work.
    assert compiled > 4 * 4 * (512 * 64 + 512 * 256)


def test_map_tensors_goes_through_containers() -> None:
    value = {"a": [torch.ones(2), 3], "b": (torch.zeros(1), None)}
    assert map_tensors(value, lambda tensor: tensor + 1)["a"][0].tolist() == [2.0, 2.0]


def test_heap_reuses_joins_and_maps() -> None:
    heap = Heap()
    blocks = [heap.allocate(10_000) for _ in range(3)]
    size = heap.resident
    assert 30_000 <= size < 31_000
    for block in blocks[:2]:
        heap.release(*block)
    assert heap.resident == size  # nothing is given back
    heap.allocate(19_000)  # fits into two that were joined
    assert heap.resident == size
    heap.allocate(10_000)
    assert heap.resident > size
    mapped = heap.allocate(MMAP_THRESHOLD)
    assert mapped[0] is None
    grown = heap.resident
    heap.release(*mapped)
    assert heap.resident <= grown - MMAP_THRESHOLD


def test_heap_never_hands_out_a_byte_twice() -> None:
    draw, heap, live = random.Random(3), Heap(), []
    for _ in range(3000):
        if live and draw.random() < 0.5:
            heap.release(*live.pop(draw.randrange(len(live))))
        else:
            live.append(heap.allocate(draw.randrange(1, 100_000)))
    taken = sorted(live)
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(taken))
    for block in live:
        heap.release(*block)
    assert heap.allocate(heap.resident // 2)[0] == 0  # all is joined again


def test_ladder_is_climbed_cheapest_first() -> None:
    ladder = build_ladder([1, 2, 4, 8], ["none", "full"])
    bytes_of = {"none": 100, "full": 10}

    def total(rung: Rung) -> int:
        return 50 + bytes_of[rung.activation_checkpointing] * rung.micro_batch_size

    def chosen(limit: int) -> Rung | None:
        return find_rung(ladder, total, limit)[0]

    assert chosen(850) == Rung(8, "none")
    assert chosen(849) == Rung(4, "none")
    assert chosen(300) == Rung(2, "none")
    assert chosen(150) == Rung(1, "none")
    assert chosen(149) == Rung(8, "full")
    assert chosen(60) == Rung(1, "full")
    rung, tried = find_rung(ladder, total, 59)
    assert rung is None and min(tried.values()) == 60
    assert build_ladder([1, 2], ["none", "full"], [False, True]) == [
        [Rung(2, "none"), Rung(1, "none")],
        [Rung(2, "full"), Rung(1, "full")],
        [Rung(2, "full", True), Rung(1, "full", True)],
    ]
    assert build_ladder([1], ["full"], [True]) == [[Rung(1, "full", True)]]


def test_plan_survives_json() -> None:
    rehearsal = Rehearsal()
    with rehearsal.running():
        torch.empty(1000)
    prediction = predict(rehearsal, is_eager=True, has_compiler=False, is_accumulating=False)
    assert isinstance(prediction, Prediction) and prediction.total == sum(prediction.by_kind().values())
    plan = MemoryPlan(
        micro_batch_size=2,
        n_micro_batches=3,
        activation_checkpointing="none",
        prediction=prediction,
        limit_bytes=10,
        limit_source="memory_limit_mib",
        tried=((Rung(4, "none"), 11), (Rung(2, "none"), 9)),
    )
    assert MemoryPlan.from_dict(plan.to_dict()) == plan
    assert "3 micro-batches of 2 rows" in plan.describe()

"""What compiled code allocates, without compiling it: a stand-in that a rehearsal can run.

torch.compile splits the joint graph of forward and backward by the cheapest cut, so that it keeps other tensors than
eager code, and fuses element-wise operators, whose results then never exist. Here the graph is traced and cut by the
same code of torch; of the rest, a result is taken to exist if a matrix product makes or reads it, or if it is kept.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten
# What is a call of a library, between the fused loops.
LIBRARY_CALLS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "_scaled_dot_product",
    "tiled_attention",
    "embedding",
    "index_put",
)
ALIASES = ("view", "_unsafe_view", "reshape", "getitem")


@dataclasses.dataclass(frozen=True)
class Region:
    """Allocations of one compiled function, in order: (name, bytes) takes, (name, None) gives back."""

    forward: list[tuple[str, int | None]]
    backward: list[tuple[str, int | None]]
    kept: list[str]
    """What the forward pass leaves to the backward pass."""
    gradients: list[str | None]
    """What the backward pass makes for each parameter and then for each input; None: it makes nothing."""


def trace_region(module: nn.Module, inputs: Sequence[Tensor], memory_budget: float) -> Region:
    """Trace module(*inputs), which returns one tensor; parameters and inputs are tensors without memory.

    Args:
        memory_budget: share of what would be kept that may be, as torch._functorch's activation_memory_budget.
    """
    from torch._functorch import config
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[tuple[fx.GraphModule, fx.GraphModule]] = []

    def cut(joint: fx.GraphModule, arguments: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        graphs.append(min_cut_rematerialization_partition(joint, arguments, **options))
        return graphs[-1]

    def leave(graph: fx.GraphModule, _: Any) -> Any:
        return make_boxed_func(graph.forward)

    with config.patch(activation_memory_budget=memory_budget):
        aot_module_simplified(
            _OneResult(module),  # type: ignore[arg-type]
            tuple(inputs),
            fw_compiler=leave,  # type: ignore[arg-type]
            bw_compiler=leave,  # type: ignore[arg-type]
            partition_fn=cut,
            decompositions=select_decomp_table(),
        )
    forward, backward = graphs[0]
    events, results = _allocations(forward.graph)
    steps_back, gradients = _allocations(backward.graph)
    return Region(
        forward=events,
        backward=steps_back,
        kept=list(dict.fromkeys(name for name in results[1:] if name is not None and name in dict(events))),
        gradients=gradients,
    )


class _OneResult(nn.Module):
    """aot_module_simplified wants a tuple."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (self.module(*inputs),)


def _allocations(graph: fx.Graph) -> tuple[list[tuple[str, int | None]], list[str | None]]:
    """The events of a graph, and the names that its results have in them (None: not a tensor of its own)."""
    nodes = list(graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    results = [argument for argument in nodes[-1].args[0] if argument is not None]
    kept = {_owner(node) for node in results if isinstance(node, fx.Node)}
    exists = {
        node
        for node in nodes
        if _is_tensor(node) and node.op == "call_function" and _owner(node) is node and not _is_tuple(node)
        if node in kept or _is_library_call(node) or any(_is_library_call(user) for user in _readers(node))
    }
    last_use: dict[fx.Node, int] = {}
    for node in reversed(nodes):  # a fused reader reads when what it is fused into is made
        moments = [place[user] if user in exists or user.op == "output" else last_use[user] for user in node.users]
        last_use[node] = max(moments, default=place[node])
    events: list[tuple[str, int | None]] = []
    ending: dict[int, list[fx.Node]] = {}
    for node in exists - kept:
        ending.setdefault(last_use[node], []).append(node)
    for index, node in enumerate(nodes):
        if node in exists:
            value = node.meta["val"]
            events.append((node.name, value.numel() * value.element_size()))
        events += [(ended.name, None) for ended in ending.get(index, [])]
    names: list[str | None] = []
    for argument in nodes[-1].args[0]:
        owner = _owner(argument) if isinstance(argument, fx.Node) else None
        names.append(owner.name if owner in exists else None)
    return events, names


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_tuple(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), tuple | list)


def _is_library_call(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and any(name.split(".")[0].startswith(call) for call in LIBRARY_CALLS)


def _owner(node: fx.Node) -> fx.Node:
    """The node whose storage this one is a view of."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        is_view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
        name = getattr(node.target, "__name__", "").split(".")[0]
        if not (is_view or name in ALIASES) or _is_tuple(node.args[0]):
            break
        node = node.args[0]
    return node


def _readers(node: fx.Node) -> Iterable[fx.Node]:
    """Users of a node and of the views of it."""
    for user in node.users:
        if user.op == "call_function" and _owner(user) is not user:
            yield from _readers(user)
        else:
            yield user


class StandIn(torch.autograd.Function):
    """Allocates what a region would."""

    @staticmethod
    def forward(ctx: Any, region: Region, result: Tensor, *tensors: Tensor) -> Tensor:
        """Allocate as the forward pass does, and return a tensor like `result`.

        Args:
            tensors: the parameters of the module that was traced, then its inputs.
        """
        held = _play(region.forward)
        ctx.region = region
        ctx.save_for_backward(*tensors, *(held[name] for name in region.kept))
        return torch.empty_like(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Allocate as the backward pass does."""
        held = _play(ctx.region.backward)
        held.clear()  # their bytes are taken again at once by the gradients that they stood for
        gradients = (
            None if name is None else torch.empty_like(tensor)
            for name, tensor in zip(ctx.region.gradients, ctx.saved_tensors, strict=False)
        )
        return (None, None, *gradients)


def _play(events: list[tuple[str, int | None]]) -> dict[str, Tensor]:
    held: dict[str, Tensor] = {}
    for name, n_bytes in events:
        if n_bytes is None:
            del held[name]
        else:
            held[name] = torch.empty(n_bytes, dtype=torch.uint8)
    return held


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it, through dataclasses, mappings and sequences, replaced by function(tensor)."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(inner, function) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(inner, function) for inner in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: map_tensors(inner, function) for name, inner in fields.items()})
    return value

"""What a layer costs, and whether it compiles whole.

B batch, T tokens, D model width.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hydra.attention.base import AttentionBackend
from hydra.attention.checks.subject import Finding, Subject, call_layer, run_layer
from hydra.attention.code import MISTAKES
from hydra.attention.custom import MEASURED_LENGTHS, count_flops, fit_quadratic
from hydra.runtime.memory.tracker import Rehearsal

N_COMPILED_TOKENS = 17
N_MEMORY_TOKENS = 1024


def check_compilation(subject: Subject) -> tuple[list[Finding], str]:
    """The layer is traced as one graph, with its gradient's inputs; what breaks it is named with its line."""
    import torch._dynamo  # takes seconds to import

    layer, x_BTD = (
        subject.build_random(torch.float32),
        subject.inputs(2, subject.usable(N_COMPILED_TOKENS), torch.float32),
    )
    torch._dynamo.reset()
    try:
        with _quietly():
            found = torch._dynamo.explain(_call(layer))(x_BTD.requires_grad_())
    except MISTAKES as error:
        return [Finding("graph breaks", subject.describe(error), N_COMPILED_TOKENS)], "not traced"
    finally:
        torch._dynamo.reset()
    breaks = [
        Finding("graph breaks", f"{_place(reason.user_stack)}: {reason.reason.splitlines()[0]}")
        for reason in found.break_reasons
        if reason.graph_break
    ]
    unique = list(dict.fromkeys(breaks))
    if found.graph_break_count and not unique:
        unique = [Finding("graph breaks", f"{found.graph_break_count} of them, at no line that is known")]
    return unique, f"{found.graph_break_count} breaks, {found.graph_count} graph(s), {found.op_count} operations"


def _call(layer: torch.nn.Module) -> Any:
    def call(x_BTD: torch.Tensor) -> torch.Tensor:
        return call_layer(layer, x_BTD)

    return call


def _place(stack: Any) -> str:
    frame = stack[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} `{(frame.line or '').strip()}`"


@contextmanager
def _quietly() -> Iterator[None]:
    """Within it the compiler does not warn of breaks, which are reported."""
    logger = logging.getLogger("torch._dynamo")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def describe_flops(subject: Subject) -> tuple[list[Finding], str]:
    """Forward operations of a sequence, fitted to counts."""

    def build() -> Any:
        layer = subject.build()
        return lambda x_BTD, positions_BT, ids_BT: run_layer(layer, x_BTD, ids_BT, positions_BT)

    try:
        counts = {n_tokens: count_flops(build, subject.d_model, n_tokens) for n_tokens in MEASURED_LENGTHS}
    except MISTAKES as error:
        return [Finding("meta device", f"without memory, forward {subject.describe(error)}")], "not counted"
    linear, quadratic = fit_quadratic(counts)
    worst = max(abs(linear * n + quadratic * n * n - count) / max(count, 1) for n, count in counts.items())
    fit = f"{linear:,.0f} T + {quadratic:,.1f} T^2, forward, fitted to T = {', '.join(map(str, counts))}"
    return [], f"{fit} (within {100 * worst:.1f} %; element-wise work is not counted)"


def describe_memory(subject: Subject) -> tuple[list[Finding], str]:
    """Peak of forward and backward pass on one sequence in float32, beyond input and parameters."""
    torch.default_generator.manual_seed(0)
    rehearsal = Rehearsal()
    try:
        with rehearsal.running():
            layer = subject.build()
            x_BTD = torch.empty(1, N_MEMORY_TOKENS, subject.d_model, requires_grad=True)
            n_before = len(rehearsal.blocks)
            rehearsal.begin("forward")
            run_layer(layer, x_BTD).sum().backward()
    except MISTAKES as error:
        what = f"without memory, forward and backward {subject.describe(error)}"
        return [Finding("meta device", what)], "not measured"
    live = peak = 0
    changes = [(block.born_at, block.n_bytes) for block in rehearsal.blocks[n_before:]]
    changes += [(block.died_at, -block.n_bytes) for block in rehearsal.blocks[n_before:] if block.died_at is not None]
    for _, change in sorted(changes):
        live += change
        peak = max(peak, live)
    input_bytes = x_BTD.numel() * 4
    return [], f"{peak / 2**20:.2f} MiB forward and backward at T = {N_MEMORY_TOKENS}, {peak / input_bytes:.0f} times x"


def describe_cache(subject: Subject) -> str:
    """Bytes of the cache, in bfloat16."""
    layer = subject.build().to(torch.bfloat16)
    if isinstance(layer, AttentionBackend):
        return f"{layer.kv_bytes_per_token} bytes a token, and {layer.constant_state_bytes} a sequence, in bfloat16"
    n_bytes = 2 * subject.d_model + 8
    return f"{n_bytes} bytes a token in bfloat16, recompute cache: each new token costs a pass over all before it"

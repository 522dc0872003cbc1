"""What does each attention cost beside multi-head attention, and does it get the time that its FLOP count promises?

    python -m diagnostics.attention_cost [bfloat16|float32] [ROUNDS]

Whole layers of width 2048, batch 1, forward and backward, compiled as a model compiles its blocks, all by the same
kernel for softmax attention; then the attention of a decode step against reading its keys and values. Arms take turns,
so that every round is of one and the same minute; figures are medians over rounds. A layer is timed only after its
outputs and gradients on a short input agree with those by torch's own attention in float32.

B batch, T tokens, D model width, N query heads, K key/value heads, S tokens that a cache holds, H head width.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.bench.machine import describe
from hydra.attention.masks import build_context
from hydra.kernels.decode import load_native, native_single_query_attention
from hydra.runtime.choices import keep_freed_memory
from hydra.testing.specs import build_random_layer, random_activations

D_MODEL, N_HEADS, HEAD_WIDTH = 2048, 16, 128
LENGTHS = (4096, 16384)
GATE_TOKENS = 1100
CONTEXT = 16384
MIN_SHARE = 0.85
MAX_READ_RATIO = 1.5
LINEAR_BAND = (3.6, 4.4)
SETTLE_S = 0.05
GATE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
"""Largest norm of the difference over the norm of what is expected."""


@dataclass(frozen=True)
class Arm:
    """An attention layer, and what is promised of it."""

    name: str
    backend: str
    options: dict[str, Any]
    is_judged: bool = False
    """Whether it must reach MIN_SHARE of its FLOP advantage."""

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The layer, with random parameters."""
        return build_random_layer(self.backend, D_MODEL, N_HEADS, dtype, **self.options)


ARMS = [
    Arm("MHA 16/16", "gqa", {"n_kv_heads": 16}),
    Arm("GQA 16/4", "gqa", {"n_kv_heads": 4}),
    Arm("CCA-4x 4/4", "ccgqa", {"n_query_heads": 4, "n_kv_heads": 4}, True),
    Arm("CCGQA-2x/8x 8/2", "ccgqa", {"n_query_heads": 8, "n_kv_heads": 2}, True),
    Arm("MLA, as DeepSeek-V2-Lite", "mla", {}),
    Arm("lightning", "lightning", {}),
]
DECODE_HEADS = {"MHA": (16, 16), "GQA 16/4": (16, 4), "CCA-4x": (4, 4), "CCGQA-2x/8x": (8, 2)}
PAPER = """\
The paper's own figures (arXiv 2510.04476, Fig. 5), MHA's time over CCA-4x's and CCGQA-2x/8x's at S = 16k, d = 128:
forward causal 1.34 and 1.26, forward non-causal 1.72 and 1.36, backward (non-causal only) 1.14 and 1.13. They are of an
H100, bfloat16, and of the attention core: without the projections, whose cost falls with the heads as well. MLA there
is slower than MHA forward (0.94x). It reports no decoding."""


def main(arguments: list[str]) -> None:
    """Print the tables."""
    dtype = getattr(torch, arguments[0] if arguments else "bfloat16")
    n_rounds = int(arguments[1]) if len(arguments) > 1 else 5
    machine = ", ".join(f"{name} {value}" for name, value in describe().items())
    print(f"{machine}, {torch.get_num_threads()} threads, {dtype}\n")
    keep_freed_memory()  # as in a trainer
    for arm in ARMS:
        check(arm, dtype)
    seconds = {}
    for n_tokens in LENGTHS:
        seconds[n_tokens] = time_layers(ARMS, dtype, n_tokens, n_rounds)
        print_layers(ARMS, dtype, n_tokens, seconds[n_tokens])
    ratio = seconds[LENGTHS[1]]["lightning"] / seconds[LENGTHS[0]]["lightning"]
    verdict = "holds" if LINEAR_BAND[0] <= ratio <= LINEAR_BAND[1] else "MISSED"
    print(f"lightning, time at {LENGTHS[1]} over {LENGTHS[0]}: {ratio:.2f} (goal {LINEAR_BAND}: {verdict})\n")
    print_decode(dtype, max(15, n_rounds))
    print(f"\n{PAPER}")


def forward_backward(layer: nn.Module, x_BTD: Tensor, kernel: str) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of the input and the parameters."""
    context = layer.prepare(build_context(x_BTD, kernel=kernel))  # type: ignore[operator]
    out_BTD = layer(x_BTD, context)
    # Any gradient will do, and this one costs no time.
    return out_BTD, list(torch.autograd.grad(out_BTD, [x_BTD, *layer.parameters()], x_BTD.detach()))


def check(arm: Arm, dtype: torch.dtype) -> None:
    """Exit unless the layer computes what it computes slowly in float32."""
    layer, slow = arm.build(dtype), arm.build(torch.float32)
    slow.load_state_dict({name: value.float() for name, value in layer.state_dict().items()})
    x_BTD = random_activations(1, GATE_TOKENS, D_MODEL, dtype=dtype)
    out, grads = forward_backward(layer, x_BTD.requires_grad_(), "tiled")
    expected, expected_grads = forward_backward(slow, x_BTD.detach().float().requires_grad_(), "scaled_dot_product")
    names = ["outputs", "x", *(name for name, _ in layer.named_parameters())]
    for name, actual, wanted in zip(names, [out, *grads], [expected, *expected_grads], strict=True):
        error = (actual.double() - wanted.double()).norm() / wanted.double().norm()
        if not error <= GATE[dtype]:
            raise SystemExit(f"{arm.name}: {name} must be within {GATE[dtype]} of float32, but got {error:.2e}")


def time_layers(arms: list[Arm], dtype: torch.dtype, n_tokens: int, n_rounds: int) -> dict[str, float]:
    """Median seconds of forward and backward by arm; the first round, which compiles, does not count."""
    torch.compiler.reset()  # or the forms of all lengths together count against torch's limit
    x_BTD = random_activations(1, n_tokens, D_MODEL, dtype=dtype).requires_grad_()
    layers = {arm.name: arm.build(dtype) for arm in arms}
    for layer in layers.values():
        layer.compile(fullgraph=True, dynamic=False)
    steps = {name: lambda layer=layer: forward_backward(layer, x_BTD, "tiled") for name, layer in layers.items()}
    return {name: statistics.median(times) for name, times in take_turns(steps, n_rounds).items()}


def take_turns(steps: dict[str, Callable[[], object]], n_rounds: int, settle_s: float = 0.0) -> dict[str, list[float]]:
    """Seconds of each step in each round but the first.

    Args:
        settle_s: take each step untimed for so long before: OpenMP's threads go on spinning for some milliseconds
            after their work, on the cores that a step with threads of its own needs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(n_rounds + 1):
        for name, step in steps.items():
            settled_at = time.perf_counter() + settle_s
            while time.perf_counter() < settled_at:
                step()
            started = time.perf_counter()
            step()
            if index > 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def print_layers(arms: list[Arm], dtype: torch.dtype, n_tokens: int, seconds: dict[str, float]) -> None:
    """One line for each arm: its time and its FLOPs beside those of the first, which is MHA."""
    print(f"Layer of width {D_MODEL}, forward and backward, T = {n_tokens}, batch 1, compiled, causal FLOPs\n")
    print("| layer | ms | times as fast as MHA | MHA's FLOPs over its | share of that reached | TFLOP/s |")
    print("|---|---|---|---|---|---|")
    flops = {arm.name: arm.build(dtype).flops(n_tokens) for arm in arms}  # type: ignore[operator]
    mha = arms[0].name
    for arm in arms:
        speed = seconds[mha] / seconds[arm.name]
        promised = flops[mha] / flops[arm.name]
        share = f"{speed / promised:.2f}"
        if arm.is_judged:
            share += f" (goal {MIN_SHARE}: {'holds' if speed / promised >= MIN_SHARE else 'MISSED'})"
        rate = 3 * flops[arm.name] / seconds[arm.name] / 1e12
        print(f"| {arm.name} | {1e3 * seconds[arm.name]:.0f} | {speed:.2f} | {promised:.2f} | {share} | {rate:.2f} |")
    print(flush=True)


def print_decode(dtype: torch.dtype, n_rounds: int) -> None:
    """Attention of one new token over CONTEXT others, against reading as many bytes with as many threads."""
    load_native(torch.get_num_threads())
    mask_B11S = torch.zeros(1, 1, 1, CONTEXT, dtype=dtype)
    print(f"Attention of a decode step, context {CONTEXT}\n")
    print(
        "| heads | keys and values, MB | ms | reading them, ms | GB/s read | times reading |\n|---|---|---|---|---|---|"
    )
    for name, (n_heads, n_kv_heads) in DECODE_HEADS.items():
        q_BN1H = random_activations(1, n_heads, 1, HEAD_WIDTH, dtype=dtype)
        kv = random_activations(2, 1, n_kv_heads, CONTEXT, HEAD_WIDTH, dtype=dtype)
        words = kv.flatten().view(torch.int32)
        steps: dict[str, Callable[[], object]] = {
            "attention": lambda q=q_BN1H, kv=kv: native_single_query_attention(q, kv[0], kv[1], mask_B11S),
            "maximum": lambda words=words: words.max(),
            "sum": lambda words=words: words.view(torch.float32).sum(),
        }
        medians = {step: statistics.median(times) for step, times in take_turns(steps, n_rounds, SETTLE_S).items()}
        reading = min(medians["maximum"], medians["sum"])
        ratio = medians["attention"] / reading
        verdict = "holds" if ratio <= MAX_READ_RATIO else "MISSED"
        print(
            f"| {name} | {kv.nbytes / 1e6:.1f} | {1e3 * medians['attention']:.2f} | {1e3 * reading:.2f} | "
            f"{kv.nbytes / reading / 1e9:.1f} | {ratio:.2f} (goal {MAX_READ_RATIO}: {verdict}) |"
        )


if __name__ == "__main__":
    main(sys.argv[1:])

"""How fast the kernels are, alone and in a model, beside what one would take instead.

B batch, T tokens, H head width.
"""

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diagnostics.gpu_proof.operators import MAKERS, Problem
from diagnostics.gpu_proof.text import as_table, attempt, say
from hydra.attention.core import softmax_attention
from hydra.attention.masks import AttentionContext, build_context
from hydra.model.framework import Execution, ModelSpec, build_model

N_REPEATS = 20
WINDOW = 512
TRAINED = {"gqa": {"n_kv_heads": 3, "qk_norm": True}, "ccgqa": {}, "5*lightning, gqa": {"n_kv_heads": 3}}
"""Attention, and its options, of the models whose training steps are timed."""
TRAINED_SHAPE = (16, 1024)
"""Rows, and tokens of each."""


def time_ms(run: Callable[[], Any]) -> float:
    """Median of N_REPEATS, by CUDA events, after warming up."""
    for _ in range(3):
        run()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(N_REPEATS)]
    for start, stop in marks:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in marks)


def time_operators() -> str:
    """Forward, and forward with backward, of each operator in bfloat16 beside torch eager, torch compiled, Liger."""
    copy_gbs = _measure_copying()
    say(f"copying: {copy_gbs:.0f} GB/s")
    rows = []
    for make in MAKERS:
        torch.compiler.reset()  # or the forms of all operators together count against torch's limit
        problem = make(True, torch.bfloat16)
        implementations = {
            "triton": partial(problem.call, kernels="triton"),
            "torch compiled": torch.compile(partial(problem.call, kernels="torch"), fullgraph=True, dynamic=False),
            "torch eager": partial(problem.call, kernels="torch"),
            **problem.others,
        }
        for name, call in implementations.items():
            failure = "**FAILED**" if name == "triton" else "not here"
            rows.append((problem.name, name, *attempt(partial(_time_one, problem, call), 4, failure)))
            say(" ".join(rows[-1]))
    heads = ("operator", "by", "forward ms", "GB/s", "forward + backward ms", "GB/s")
    note = f"bfloat16. GB/s: the least that must be read and written, over the time; copying reaches {copy_gbs:.0f}."
    if importlib.util.find_spec("liger_kernel") is None:
        note += " Liger: skipped, not installed."
    return f"{note}\n\n{as_table(heads, rows)}"


def _measure_copying() -> float:
    source = torch.empty(2**28, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_ms(lambda: target.copy_(source)) / 1e6


def _time_one(problem: Problem, call: Callable[..., Tensor]) -> list[str]:
    leaves = [tensor.detach().requires_grad_() for tensor in problem.inputs]
    with torch.no_grad():
        out = call(*problem.inputs)
        forward_ms = time_ms(lambda: call(*problem.inputs))
    grad = torch.randn_like(out)
    both_ms = time_ms(lambda: torch.autograd.grad(call(*leaves), leaves, grad))
    input_bytes = sum(tensor.nbytes for tensor in problem.inputs)
    forward_bytes = input_bytes + out.nbytes
    both_bytes = forward_bytes + out.nbytes + 2 * input_bytes
    return [
        f"{forward_ms:.3f}",
        f"{forward_bytes / forward_ms / 1e6:.0f}",
        f"{both_ms:.3f}",
        f"{both_bytes / both_ms / 1e6:.0f}",
    ]


def time_attention() -> str:
    """Causal softmax attention in bfloat16: torch's choices one by one, and flash-attn where it is installed."""
    implementations: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        f"torch {backend.name}": partial(_torch_attention, backend)
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    }
    implementations["hydra, scaled_dot_product"] = partial(_hydra_attention, "scaled_dot_product", None)
    implementations["hydra, flex, compiled"] = torch.compile(partial(_hydra_attention, "flex", None), dynamic=False)
    windowed = partial(_hydra_attention, "flex", WINDOW)
    implementations[f"hydra, flex, compiled, window {WINDOW}"] = torch.compile(windowed, dynamic=False)
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if has_flash:
        implementations["flash-attn"] = _flash_attention
    rows = []
    for n_batch, n_tokens, n_heads, n_kv_heads, width in ((8, 2048, 16, 4, 128), (4, 4096, 32, 8, 64)):
        torch.compiler.reset()
        flops = 4 * n_batch * n_heads * width * n_tokens * (n_tokens + 1) / 2
        q, k, v = (
            torch.randn(n_batch, n_tokens, n, width, dtype=torch.bfloat16, device="cuda").requires_grad_()
            for n in (n_heads, n_kv_heads, n_kv_heads)
        )
        for name, call in implementations.items():
            shape = f"B={n_batch} T={n_tokens} {n_heads}q/{n_kv_heads}kv H={width}"
            failure = "**FAILED**" if name.startswith("hydra") else "not here"
            rows.append((shape, name, *attempt(partial(_time_attention, call, [q, k, v], flops), 4, failure)))
            say(" ".join(rows[-1]))
    heads = ("shape", "by", "forward ms", "TFLOP/s", "forward + backward ms", "TFLOP/s (3.5 forwards)")
    return as_table(heads, rows) + ("" if has_flash else "\n\nflash-attn: skipped, not installed.")


def _time_attention(call: Callable[..., Tensor], inputs: list[Tensor], flops: float) -> list[str]:
    forward_ms = time_ms(lambda: call(*inputs))
    grad = torch.randn_like(call(*inputs))
    both_ms = time_ms(lambda: torch.autograd.grad(call(*inputs), inputs, grad))
    forward = [f"{forward_ms:.3f}", f"{flops / forward_ms / 1e9:.0f}"]
    return [*forward, f"{both_ms:.3f}", f"{3.5 * flops / both_ms / 1e9:.0f}"]


def _torch_attention(backend: SDPBackend, *qkv: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _hydra_attention(kernel: str, window: int | None, *qkv: Tensor) -> Tensor:
    context = prepared_context(kernel, window, qkv[0].shape[0], qkv[0].shape[1])
    q, k, v = (x.transpose(1, 2) for x in qkv)
    return softmax_attention(q, k, v, context).transpose(1, 2)


@cache
@torch.compiler.disable
def prepared_context(kernel: str, window: int | None, n_batch: int, n_tokens: int) -> AttentionContext:
    """What a model works out once for all of its layers."""
    tokens_BT1 = torch.empty(n_batch, n_tokens, 1, device="cuda")
    return build_context(tokens_BT1, kernel=kernel).specialise(torch.bfloat16, window=window)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return importlib.import_module("flash_attn").flash_attn_func(q, k, v, causal=True)


def time_training_step() -> str:
    """Tokens per second of forward and backward of 12-layer models, as written and compiled, by torch and by Triton."""
    rows = [
        _time_model(attention, compiled=compiled, kernels=kernels)
        for attention in TRAINED
        for compiled in (False, True)
        for kernels in ("torch", "triton")
    ]
    heads = ("attention", "", "kernels", "ms", "tokens/s", "model TFLOP/s", "peak MiB", "first step s")
    n_rows, n_tokens = TRAINED_SHAPE
    title = f"12 layers, 768 wide, SwiGLU, bfloat16; {n_rows} x {n_tokens} tokens, forward and backward."
    return f"{title}\n\n{as_table(heads, rows)}"


def _time_model(attention: str, *, compiled: bool, kernels: str) -> tuple[str, ...]:
    torch.compiler.reset()
    torch.cuda.reset_peak_memory_stats()
    spec = ModelSpec(
        vocab_size=32768,
        d_model=768,
        n_layers=12,
        n_heads=12,
        attention=attention,
        attention_options=TRAINED[attention],
        feed_forward="swiglu",
        d_feed_forward=2048,
        tie_embeddings=True,
        norm_eps=1e-6,
    )
    model = build_model(spec, execution=Execution(kernels=kernels), device="cuda", dtype=torch.bfloat16)
    if compiled:
        model.compile_regions()
    n_rows, n_tokens = TRAINED_SHAPE
    inputs_BT = torch.randint(32768, (n_rows, n_tokens), device="cuda")

    def step() -> None:
        model(inputs_BT, inputs_BT).losses["cross_entropy"].backward()
        model.zero_grad(set_to_none=True)

    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first_s = time.perf_counter() - began
    step_ms = time_ms(step)
    tflops = model.flops_per_token(n_tokens) * n_rows * n_tokens / step_ms / 1e9
    peak = torch.cuda.max_memory_allocated() / 2**20
    figures = (f"{step_ms:.1f}", f"{n_rows * n_tokens / step_ms * 1e3:,.0f}", f"{tflops:.0f}", f"{peak:,.0f}")
    row = (attention, "compiled" if compiled else "eager", kernels, *figures, f"{first_s:.1f}")
    say(" ".join(row))
    return row

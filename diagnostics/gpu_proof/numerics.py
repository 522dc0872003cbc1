"""Whether the kernels compute the right thing: each alone, whole models, and more elements than 32 bits count."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from diagnostics.gpu_proof.operators import MAKERS, Problem
from diagnostics.gpu_proof.text import as_table, attempt, say
from hydra.attention import available_backends
from hydra.attention.core import check_kernel, softmax_attention
from hydra.attention.masks import build_context, interval_mask, to_additive
from hydra.errors import ConfigError
from hydra.kernels.dispatch import KERNELS
from hydra.kernels.reference.blocked_attention import blocked_attention as reference_attention
from hydra.kernels.rms_norm import rms_norm
from hydra.kernels.squared_relu import squared_relu
from hydra.model.framework import Execution, ModelSpec, build_model
from hydra.testing.operators import check_operator, inside_nan
from hydra.testing.specs import document_ids, random_activations, randomise, tiny_model_spec
from hydra.testing.tolerances import MAX_RELATIVE_ERROR, relative_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_numerics() -> str:
    """Every operator in three dtypes against float64: output, every gradient, and the same bits twice."""
    rows = []
    for make in MAKERS:
        for dtype in DTYPES:
            problem = make(False, dtype)
            cells = attempt(partial(_check_one, problem), 2)
            rows.append((problem.name, str(dtype).removeprefix("torch."), *cells))
            say(" ".join(rows[-1]))
    note = "Largest error over largest magnitude (bfloat16: Frobenius norms), inputs inside memory that is NaN.\n\n"
    return note + as_table(("operator", "dtype", "verdict", "relative errors"), rows)


def _check_one(problem: Problem) -> list[str]:
    fast = partial(problem.call, kernels="triton")
    inputs = [inside_nan(tensor) for tensor in problem.inputs]
    errors = check_operator(fast, problem.reference, inputs, problem.names)
    verdict = "ok" if _same_bits_twice(fast, inputs) else "**FAILED**: other bits the second time"
    return [verdict, ", ".join(f"{name} {error:.1e}" for name, error in errors.items())]


def _same_bits_twice(fast: Callable[..., Tensor], inputs: list[Tensor]) -> bool:
    def run() -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        out = fast(*leaves)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    return all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


def check_attention_kernels() -> str:
    """Softmax attention by every kernel that can train here, with documents and windows, against float64."""
    rows = []
    for kernel in ("scaled_dot_product", "flex", "flash"):
        for hidden in ("nothing", "documents", "window", "documents and window"):
            cells = attempt(partial(_check_attention, kernel, hidden), 2)
            rows.append((kernel, hidden, *cells))
            say(" ".join(rows[-1]))
    note = (
        "bfloat16, 8 query and 2 key heads, 300 tokens; flex compiled. Frobenius norms of errors and of what is right."
    )
    return note + "\n\n" + as_table(("kernel", "hidden by", "verdict", "relative errors"), rows)


def _check_attention(kernel: str, hidden: str) -> list[str]:
    try:
        check_kernel(kernel, "cuda", torch.bfloat16, 64)
    except ConfigError as error:
        return ["skipped", str(error)]
    torch.compiler.reset()
    ids_BT = document_ids(120, 1, 179).expand(2, -1).cuda() if "documents" in hidden else None
    tokens_BT1 = torch.empty(2, 300, 1, device="cuda")
    context = build_context(tokens_BT1, document_ids_BT=ids_BT, kernel=kernel)
    context = context.specialise(torch.bfloat16, window=70 if "window" in hidden else None)
    q, k, v, weight = (
        random_activations(2, n, 300, 64, dtype=torch.bfloat16, seed=seed).cuda() for seed, n in enumerate((8, 2, 2, 8))
    )
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    attend = torch.compile(softmax_attention, dynamic=False) if kernel == "flex" else softmax_attention
    out = attend(*inputs, context)
    first_BT = context.first_visible_BT
    first_BT = torch.zeros(1, 300, dtype=torch.int64, device="cuda") if first_BT is None else first_BT
    mask_B1TS = to_additive(interval_mask(first_BT, 0), torch.float64)[:, None]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = reference_attention(exact[0].unflatten(1, (2, 4)), exact[1], exact[2], mask_B1TS).flatten(1, 2)
    pairs = {"output": (out, expected)}
    grads, expected_grads = (torch.autograd.grad((x * weight).sum(), y) for x, y in ((out, inputs), (expected, exact)))
    pairs |= {name: pair for name, *pair in zip("qkv", grads, expected_grads, strict=True)}
    errors = {name: relative_error(*pair, torch.bfloat16) for name, pair in pairs.items()}
    is_well = all(error <= MAX_RELATIVE_ERROR[torch.bfloat16] for error in errors.values())
    told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return ["ok" if is_well else "**FAILED**", told]


def check_models() -> str:
    """A model served by Triton's kernels against the same one on torch's: loss and gradients, eager and compiled."""
    rows = []
    for attention in available_backends():
        for feed_forward, dtype, is_compiled in (
            ("swiglu", torch.float32, False),
            ("squared_relu", torch.bfloat16, False),
            ("swiglu", torch.bfloat16, True),
        ):
            cells = attempt(partial(_check_model, attention, feed_forward, dtype, is_compiled), 5)
            what = (str(dtype).removeprefix("torch."), "compiled" if is_compiled else "eager")
            rows.append((attention, feed_forward, *what, *cells))
            say(" ".join(rows[-1]))
    heads = (
        "attention",
        "feed-forward",
        "dtype",
        "",
        "verdict",
        "torch: loss",
        "gradients",
        "triton: loss",
        "gradients",
    )
    return "Relative errors against torch's operators in float32.\n\n" + as_table(heads, rows)


def _check_model(attention: str, feed_forward: str, dtype: torch.dtype, is_compiled: bool) -> list[str]:
    spec = tiny_model_spec(attention=attention, feed_forward=feed_forward, d_model=64)
    exact_loss, exact = _loss_and_gradients(spec, "torch", torch.float32, False)
    errors = []
    for kernels in KERNELS:
        loss, grads = _loss_and_gradients(spec, kernels, dtype, is_compiled)
        errors += [abs(loss / exact_loss - 1).item(), ((grads - exact).norm() / exact.norm()).item()]
    # Another order of roundings may cost about as much as torch's own, not more.
    limit = 1e-4 if dtype == torch.float32 else max(1.5 * errors[1], 1e-3)
    return ["ok" if errors[3] <= limit else "**FAILED**", *(f"{error:.1e}" for error in errors)]


def _loss_and_gradients(spec: ModelSpec, kernels: str, dtype: torch.dtype, is_compiled: bool) -> tuple[Tensor, Tensor]:
    torch.compiler.reset()
    model = build_model(spec, execution=Execution(kernels=kernels), device="cuda")
    randomise(model)
    model = model.to(dtype)
    if is_compiled:
        model.compile_regions()
    inputs_BT = torch.randint(61, (4, 70), generator=torch.Generator().manual_seed(0)).cuda()
    loss = model(inputs_BT, inputs_BT.roll(-1, dims=1)).losses["cross_entropy"]
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), torch.cat([grad.flatten().double() for grad in grads])


def check_large_offsets() -> str:
    """More than 2**31 elements: offsets that do not fit 32 bits."""
    n_rows, width = 2**20 + 3, 2048
    free_bytes, _ = torch.cuda.mem_get_info()
    if free_bytes < 12 * 2**30:
        return f"Skipped: needs 12 GiB of free GPU memory, there are {free_bytes / 2**30:.1f}."
    x = torch.empty(n_rows, width, dtype=torch.bfloat16, device="cuda").normal_()
    weight = torch.rand(width, dtype=torch.bfloat16, device="cuda")
    rows = []
    for name, fast in (
        ("rms_norm", lambda x, kernels: rms_norm(x, weight, 1e-6, kernels)),
        ("squared_relu", squared_relu),
    ):
        y = fast(x, kernels="triton")
        expected = fast(x[-5:], kernels="torch")
        error = ((y[-5:].double() - expected.double()).norm() / expected.double().norm()).item()
        rows.append((name, f"{n_rows * width:,}", "ok" if error < 1e-2 else "**FAILED**", f"{error:.1e}"))
        say(str(rows[-1]))
        del y
    return as_table(("operator", "elements", "verdict", "relative error of the last 5 rows"), rows)

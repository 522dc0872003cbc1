"""Gradients, precision and size of what a layer computes.

B batch, T tokens, D model width, H head width.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hydra.testing.card.subject import MISTAKES, Finding, Subject, describe, find_smallest, run_layer

MAX_BFLOAT16_RATIO = 8.0
"""How many times as far from float64 as gqa a layer in bfloat16 may be: three bits."""
PRECISION_LENGTHS = (1, 2, 17, 129, 513)
LARGE_INPUT = 16.0
"""Inputs of this deviation make scores of some hundreds, whose exponential no format holds."""
MAX_SIZE_RATIO = 2.0
"""How many times as large outputs may be when heads are wider or more, with inputs and weights of equal deviation."""
WIDTHS = {"n_heads=2, d_model=32": (32, 2), "n_heads=2, d_model=256": (256, 2), "n_heads=16, d_model=256": (256, 16)}
N_SIZE_TOKENS = 256


def check_gradients(subject: Subject) -> list[Finding]:
    """Analytic gradients of input and parameters equal numeric ones in float64, with two documents."""
    layer = subject.resized(16, 2).build_random()
    names = [name for name, _ in layer.named_parameters()]

    def compute(x_BTD: Tensor, *values: Tensor) -> Tensor:
        ids_BT = (torch.arange(x_BTD.shape[1]) >= x_BTD.shape[1] // 2).long()[None]
        positions_BT = torch.arange(x_BTD.shape[1])[None]
        torch.default_generator.manual_seed(0)
        run = copy.deepcopy(layer) if subject.is_stateful else layer
        if hasattr(run, "kv_bytes_per_token"):
            given = {"positions_BT": positions_BT, "document_ids_BT": ids_BT}
            return functional_call(run, dict(zip(names, values, strict=True)), (x_BTD,), given)
        return functional_call(run, dict(zip(names, values, strict=True)), (x_BTD, positions_BT, ids_BT))

    def look(n_tokens: int) -> str | None:
        x_BTD = subject.resized(16, 2).inputs(1, n_tokens).requires_grad_()
        values = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
        if not compute(x_BTD, *values).requires_grad:
            return "outputs have no gradient"
        whole = torch.autograd.gradcheck(compute, (x_BTD, *values), fast_mode=True, raise_exception=False)
        if whole:
            return None
        for name, value in (("the input", x_BTD), *zip(names, values, strict=True)):
            others = [one.detach() for one in (x_BTD, *values)]
            index = next(i for i, one in enumerate((x_BTD, *values)) if one is value)
            others[index] = value
            try:
                torch.autograd.gradcheck(compute, others, fast_mode=True)
            except (torch.autograd.gradcheck.GradcheckError, RuntimeError):  # type: ignore[attr-defined]
                return f"the gradient of {name} is not the numeric one (or something is computed in float32)"
        return "analytic gradients are not the numeric ones (or something is computed in float32)"

    return find_smallest(subject, "gradcheck", look, maximum=9)


def check_parameters(subject: Subject) -> list[Finding]:
    """Every parameter gets a gradient that is finite and not zero."""
    layer, n_tokens = subject.build_random(), 33
    run_layer(layer, subject.inputs(2, n_tokens)).square().sum().backward()
    found = []
    for name, parameter in layer.named_parameters():
        if parameter.grad is None or not parameter.grad.abs().max() > 1e-12:
            found.append(Finding("gradient to every parameter", f"{name} gets none", n_tokens))
        elif not parameter.grad.isfinite().all():
            found.append(Finding("gradient to every parameter", f"that of {name} is not finite", n_tokens))
    return found


def bfloat16_error(subject: Subject, n_tokens: int, deviation: float = 1.0) -> float:
    """Distance of a layer in bfloat16 from the same in float64, over the latter's size (Frobenius norms)."""
    layer = subject.build_random(torch.bfloat16)
    exact = copy.deepcopy(layer).to(torch.float64)
    x_BTD = (subject.inputs(2, n_tokens) * deviation).to(torch.bfloat16)
    with torch.no_grad():
        expected_BTD = run_layer(exact, x_BTD.double())
        difference_BTD = run_layer(layer, x_BTD).double() - expected_BTD
    return float(difference_BTD.norm() / expected_BTD.norm())


def check_precision(subject: Subject, reference: Subject) -> tuple[list[Finding], str]:
    """In bfloat16 the error is of gqa's size; large inputs give finite outputs. Also: the errors, in words."""
    rows = []
    try:
        for n_tokens in sorted(set(PRECISION_LENGTHS) - subject.broken):
            if not math.isfinite(bfloat16_error(subject, n_tokens, LARGE_INPUT)):
                what = f"inputs of deviation {LARGE_INPUT:g} give NaN or infinity"
                return [Finding("bfloat16", what, n_tokens)], "not finite"
            error, theirs = bfloat16_error(subject, n_tokens), bfloat16_error(reference, n_tokens)
            rows.append(f"{error:.4f} ({error / theirs:.1f} times gqa's) at T = {n_tokens}")
            if not error <= MAX_BFLOAT16_RATIO * theirs:
                return [Finding("bfloat16", f"the error is {error / theirs:.1f} times gqa's", n_tokens)], rows[-1]
    except MISTAKES as error:
        return [Finding("bfloat16", describe(error))], "does not run"
    return [], rows[-1]


def check_scale(subject: Subject) -> tuple[list[Finding], str]:
    """Outputs are of one size however wide a head is and however many there are. Also: sizes by length, in words.

    Inputs and weights keep their deviation, so that a score q k / sqrt(H) does. One that is divided by another power
    of H, or by none, weighs keys more sharply or more evenly in wide heads, and averages have another size.
    """
    sizes: dict[float, dict[str, float]] = {}
    try:
        layers = {name: subject.resized(*widths).build_random(torch.float32) for name, widths in WIDTHS.items()}
        for deviation in (0.5, 1.0, 2.0, 4.0):
            sizes[deviation] = {
                name: size_of(subject.resized(*WIDTHS[name]), layer, N_SIZE_TOKENS, deviation)
                for name, layer in layers.items()
            }
        longer = [size_of(subject.resized(32, 2), layers["n_heads=2, d_model=32"], n, 1.0) for n in (16, 128, 1024)]
    except MISTAKES as error:
        return [Finding("scale", describe(error))], "does not run"
    row = ", ".join(f"{size:.3f} at T = {n}" for size, n in zip(longer, (16, 128, 1024), strict=True))
    for deviation, by_width in sizes.items():
        smallest, largest = (choose(by_width, key=lambda name: by_width[name]) for choose in (min, max))
        ratio = by_width[largest] / max(by_width[smallest], 1e-30)
        if not ratio <= MAX_SIZE_RATIO:
            what = (
                f"outputs of inputs of deviation {deviation:g} are {ratio:.1f} times as large at {largest} as at "
                f"{smallest}: scores are not divided by the root of what they sum over"
            )
            return [Finding("scale", what, smallest_scale_t(subject, deviation))], row
    return [], row


def size_of(subject: Subject, layer: nn.Module, n_tokens: int, deviation: float) -> float:
    """Root mean square of the last outputs of a sequence, over the deviation of its inputs."""
    with torch.no_grad():
        out_BTD = run_layer(layer, subject.inputs(2, n_tokens, torch.float32) * deviation)
    return float(out_BTD[:, n_tokens // 2 :].square().mean().sqrt()) / deviation


def smallest_scale_t(subject: Subject, deviation: float) -> int:
    """The shortest of 2, 4, 8, ... tokens on which sizes differ by MAX_SIZE_RATIO."""
    layers = {widths: subject.resized(*widths).build_random(torch.float32) for widths in WIDTHS.values()}
    n_tokens = 2
    while n_tokens < N_SIZE_TOKENS:
        sizes = [size_of(subject.resized(*widths), layer, n_tokens, deviation) for widths, layer in layers.items()]
        if max(sizes) > MAX_SIZE_RATIO * min(sizes):
            return n_tokens
        n_tokens *= 2
    return N_SIZE_TOKENS

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
BASE_WIDTHS = (32, 2)
MAX_SIZE_RATIOS = {(256, 2): 2.0, (256, 16): 3.5}
"""How many times as large outputs may be at another d_model and n_heads, with inputs and weights of equal deviation:
heads eight times as wide, and eight times as many, among which a layer may share out its work otherwise."""
DEVIATIONS = (0.5, 1.0, 2.0, 4.0)
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
    try:
        ratios = [
            (size_ratio(subject, widths, N_SIZE_TOKENS, deviation), widths, deviation)
            for widths in MAX_SIZE_RATIOS
            for deviation in DEVIATIONS
        ]
        base = subject.resized(*BASE_WIDTHS)
        layer = base.build_random(torch.float32)
        longer = [(size_of(base, layer, n_tokens, 1.0), n_tokens) for n_tokens in (16, 128, 1024)]
    except MISTAKES as error:
        return [Finding("scale", describe(error))], "does not run"
    row = ", ".join(f"{size:.3f} at T = {n_tokens}" for size, n_tokens in longer)
    for ratio, widths, deviation in ratios:
        if not ratio <= MAX_SIZE_RATIOS[widths]:
            what = (
                f"outputs of inputs of deviation {deviation:g} change {ratio:.1f}-fold from (d_model, n_heads) = "
                f"{BASE_WIDTHS} to {widths}; scores must be divided by the root of what they sum over"
            )
            n_tokens = 2
            while n_tokens < N_SIZE_TOKENS and size_ratio(subject, widths, n_tokens, deviation) <= ratio / 2:
                n_tokens += n_tokens
            return [Finding("scale", what, n_tokens)], row
    return [], f"{row}; {', '.join(f'{ratio:.2f}' for ratio, _, _ in ratios)} by width"


def size_ratio(subject: Subject, widths: tuple[int, int], n_tokens: int, deviation: float) -> float:
    """How many times as large outputs are at one width as at the other, whichever is larger."""
    sized = [subject.resized(*BASE_WIDTHS), subject.resized(*widths)]
    sizes = [size_of(one, one.build_random(torch.float32), n_tokens, deviation) for one in sized]
    return max(sizes) / max(min(sizes), 1e-30)


def size_of(subject: Subject, layer: nn.Module, n_tokens: int, deviation: float) -> float:
    """Root mean square of the last outputs of a sequence, over the deviation of its inputs."""
    with torch.no_grad():
        out_BTD = run_layer(layer, subject.inputs(2, n_tokens, torch.float32) * deviation)
    return float(out_BTD[:, n_tokens // 2 :].square().mean().sqrt()) / deviation

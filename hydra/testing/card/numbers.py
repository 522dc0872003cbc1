"""Gradients, precision and size of what a layer computes.

B batch, T tokens, D model width, H head width.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hydra.attention.base import AttentionBackend
from hydra.attention.checks.subject import Finding, Subject, find_smallest, run_layer
from hydra.attention.code import MISTAKES

MAX_BFLOAT16_RATIO = 8.0
"""How many times as far from float64 as gqa a layer in bfloat16 may be: three bits."""
PRECISION_LENGTHS = (1, 2, 17, 128, 512)
LARGE_INPUT = 16.0
"""Inputs of this deviation make scores of some hundreds, whose exponential no format holds."""
BASE_WIDTHS = (32, 2)
OTHER_WIDTHS = ((512, 2), (512, 32))
"""d_model and n_heads: heads sixteen times as wide, and sixteen times as many."""
N_SCALE_TOKENS = 128
POWERS = [power / 2 for power in range(-8, 9)]
MAX_TURN_SHIFT = 0.5
"""Octaves. Right layers were seen to shift by 0.2, those with a wrong power of the width by 0.8 and more."""
MIN_RANGE = 3.0


def check_gradients(subject: Subject) -> list[Finding]:
    """Analytic gradients of input and parameters equal numeric ones in float64, with two documents."""
    layer = subject.resized(16, 2).build_random()
    names = [name for name, _ in layer.named_parameters()]

    def compute(x_BTD: Tensor, *values: Tensor) -> Tensor:
        ids_BT = (torch.arange(x_BTD.shape[1]) >= x_BTD.shape[1] // 2).long()[None]
        positions_BT = torch.arange(x_BTD.shape[1])[None]
        torch.default_generator.manual_seed(0)
        run = copy.deepcopy(layer) if subject.is_stateful else layer
        if isinstance(run, AttentionBackend):
            given = {"positions_BT": positions_BT, "document_ids_BT": ids_BT}
            return functional_call(run, dict(zip(names, values, strict=True)), (x_BTD,), given)
        return functional_call(run, dict(zip(names, values, strict=True)), (x_BTD, positions_BT, ids_BT))

    def agrees(x_BTD: Tensor, values: list[Tensor]) -> bool:
        # Where something is computed in float32, steps must be larger than its rounding.
        eps, atol, rtol = (1e-2, 1e-2, 1e-2) if subject.is_single else (1e-6, 1e-5, 1e-3)
        given = (x_BTD, *values)
        return torch.autograd.gradcheck(
            compute, given, eps=eps, atol=atol, rtol=rtol, fast_mode=True, raise_exception=False
        )

    def look(n_tokens: int) -> str | None:
        x_BTD = subject.resized(16, 2).inputs(1, n_tokens)
        values = [parameter.detach().clone() for parameter in layer.parameters()]
        for name, value in (("the input", x_BTD), *zip(names, values, strict=True)):
            value.requires_grad_()
            if compute(x_BTD, *values).requires_grad and not agrees(x_BTD, values):
                return f"the gradient of {name} is not the numeric one"
            value.requires_grad_(False)
        return None

    return find_smallest(subject, "gradcheck", look, maximum=5)


def check_parameters(subject: Subject) -> list[Finding]:
    """Every parameter gets a gradient that is finite and not zero."""
    layer, n_tokens = subject.build_random(), subject.usable(33)
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
        for n_tokens in (subject.usable(n_tokens) for n_tokens in PRECISION_LENGTHS):
            if not math.isfinite(bfloat16_error(subject, n_tokens, LARGE_INPUT)):
                what = f"inputs of deviation {LARGE_INPUT:g} give NaN or infinity"
                return [Finding("bfloat16", what, n_tokens)], "not finite"
            error, theirs = bfloat16_error(subject, n_tokens), bfloat16_error(reference, n_tokens)
            rows.append(f"{error:.4f} ({error / theirs:.1f} times gqa's) at T = {n_tokens}")
            if not error <= MAX_BFLOAT16_RATIO * theirs:
                return [Finding("bfloat16", f"the error is {error / theirs:.1f} times gqa's", n_tokens)], rows[-1]
    except MISTAKES as error:
        return [Finding("bfloat16", subject.describe(error))], "does not run"
    return [], rows[-1]


def check_scale(subject: Subject) -> tuple[list[Finding], str]:
    """Scores are of one size however wide a head is and however many there are. Also: sizes by length, in words.

    Inputs that grow turn an average over many tokens into a choice of few, which makes outputs larger. With weights
    that keep deviations, q k / sqrt(H) lets that happen at inputs of one deviation whatever the width. With another
    power of H, or with the root of d_model, it happens elsewhere. Layers whose outputs do not tell are not judged.
    """
    try:
        turns = {widths: find_turn(subject.resized(*widths), N_SCALE_TOKENS) for widths in (BASE_WIDTHS, *OTHER_WIDTHS)}
        base = subject.resized(*BASE_WIDTHS)
        layer = base.build_random(torch.float32)
        longer = [(size_of(base, layer, n_tokens, 1.0), n_tokens) for n_tokens in (16, 128, 1024)]
    except MISTAKES as error:
        return [Finding("scale", subject.describe(error))], "does not run"
    row = ", ".join(f"{size:.3f} at T = {n_tokens}" for size, n_tokens in longer)
    for widths in OTHER_WIDTHS:
        shift = compare_turns(turns[BASE_WIDTHS], turns[widths], MIN_RANGE)
        if not abs(shift) <= MAX_TURN_SHIFT:
            way = "more sharply" if shift < 0 else "more evenly"
            what = (
                f"keys are weighed {way} at d_model={widths[0]}, n_heads={widths[1]} than at d_model={BASE_WIDTHS[0]}, "
                f"n_heads={BASE_WIDTHS[1]}, as if inputs were {2 ** abs(shift):.1f} times as "
                f"{'large' if shift < 0 else 'small'}; divide scores by the root of the head width"
            )
            return [Finding("scale", what, smallest_scale_t(subject, widths))], row
    return [], row


def find_turn(subject: Subject, n_tokens: int) -> tuple[float, float]:
    """log2 of the deviation of inputs at which outputs are halfway from their least to their largest; largest / least.

    Outputs over the deviation of inputs, on a scale of logarithms.
    """
    layer = subject.build_random(torch.float32)
    sizes = [math.log2(max(size_of(subject, layer, n_tokens, 2.0**power), 1e-30)) for power in POWERS]
    middle = (max(sizes) + min(sizes)) / 2
    for index in range(len(sizes) - 1):
        before, after = sizes[index], sizes[index + 1]
        if min(before, after) <= middle <= max(before, after) and before != after:
            step = POWERS[index + 1] - POWERS[index]
            return POWERS[index] + step * (middle - before) / (after - before), 2.0 ** (max(sizes) - min(sizes))
    return 0.0, 1.0


def compare_turns(base: tuple[float, float], other: tuple[float, float], min_range: float) -> float:
    """Octaves between the two; 0 where outputs change too little to tell."""
    return other[0] - base[0] if min(base[1], other[1]) >= min_range else 0.0


def smallest_scale_t(subject: Subject, widths: tuple[int, int]) -> int:
    """The shortest of 4, 8, 16, ... tokens on which the same is seen."""
    n_tokens = 4
    while n_tokens < N_SCALE_TOKENS:
        base, other = (find_turn(subject.resized(*one), n_tokens) for one in (BASE_WIDTHS, widths))
        if abs(compare_turns(base, other, MIN_RANGE / 2)) > MAX_TURN_SHIFT:
            return n_tokens
        n_tokens *= 2
    return N_SCALE_TOKENS


def size_of(subject: Subject, layer: nn.Module, n_tokens: int, deviation: float) -> float:
    """Root mean square of the last outputs of a sequence, over the deviation of its inputs."""
    with torch.no_grad():
        out_BTD = run_layer(layer, subject.inputs(2, n_tokens, torch.float32) * deviation)
    return float(out_BTD[:, n_tokens // 2 :].square().mean().sqrt()) / deviation

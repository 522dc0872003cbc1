"""What a layer may keep: parameters, and nothing from one call to the next. And whether it runs at every length.

B batch, T tokens, D model width.
"""

import torch

from hydra.attention.custom import refuse_hidden_tensors
from hydra.errors import ConfigError
from hydra.testing.card.subject import (
    LENGTHS,
    Finding,
    Subject,
    call_layer,
    describe,
    find_smallest,
    look_safely,
    run_layer,
)


def check_lengths(subject: Subject) -> list[Finding]:
    """Every length, from one token on, runs and gives finite outputs of its own shape and dtype.

    Lengths that do not are left out of what follows.
    """

    def look(n_tokens: int) -> str | None:
        x_BTD = subject.inputs(2, n_tokens)
        out_BTD = subject.run(x_BTD)
        if out_BTD.shape != x_BTD.shape:
            return f"gives {tuple(out_BTD.shape)} for {tuple(x_BTD.shape)}"
        if out_BTD.dtype != x_BTD.dtype:
            return f"gives {out_BTD.dtype} for {x_BTD.dtype}"
        return None if out_BTD.isfinite().all() else "gives NaN or infinity"

    with torch.no_grad():
        first = find_smallest(subject, "lengths", look)
        if not first:
            return []
        subject.broken |= {n_tokens for n_tokens in LENGTHS if look_safely(look, n_tokens)}
    lengths = sorted(subject.broken)
    also = f"; so does T = {', '.join(map(str, lengths[1:6]))}, ..." if len(lengths) > 1 else ""
    name = "T = 1" if lengths == [1] else "odd lengths" if all(n % 2 for n in lengths) else "lengths"
    return [Finding(name, first[0].what + also, first[0].smallest_t)]


def check_repeats(subject: Subject) -> list[Finding]:
    """In evaluation the same call gives the same to the bit, whatever was called in between."""
    layer = subject.build_random()

    def again(n_tokens: int) -> str | None:
        x_BTD = subject.inputs(2, n_tokens)
        same = torch.equal(call_layer(layer, x_BTD), call_layer(layer, x_BTD))
        return None if same else "the same call twice gives two results"

    def after_others(n_tokens: int) -> str | None:
        x_BTD = subject.inputs(2, n_tokens)
        for n_batch, n_others in ((2, n_tokens), (1, n_tokens + 2)):
            fresh = subject.build_random()
            out_BTD = run_layer(fresh, x_BTD)
            if n_others not in subject.broken:
                run_layer(fresh, subject.inputs(n_batch, n_others, seed=1))
            if not torch.equal(out_BTD, run_layer(fresh, x_BTD)):
                return f"a call gives another result after one with {n_batch} rows of {n_others} other tokens"
        return None

    subject.look_for_single()
    with torch.no_grad():
        between = find_smallest(subject, "state between calls", after_others, maximum=17)
        found = [] if between else find_smallest(subject, "determinism", again, maximum=36)
    subject.is_stateful = bool(between)
    return between + found


def check_state_dict(subject: Subject) -> list[Finding]:
    """Built without memory, then loaded, it computes the same: nothing is kept outside its state dict."""
    layer, x_BTD = subject.build_random(), subject.inputs(2, subject.usable(7))
    try:
        refuse_hidden_tensors(layer, subject.name)
    except ConfigError as error:
        return [Finding("state dict", str(error))]
    with torch.no_grad():
        with torch.device("meta"):
            other = subject.build()
        other = other.double().to_empty(device="cpu").eval()
        other.load_state_dict(layer.state_dict())
        try:
            same = torch.equal(run_layer(other, x_BTD), run_layer(layer, x_BTD))
        except RuntimeError as error:
            return [Finding("state dict", f"built on the meta device and loaded, it {describe(error)}")]
    return [] if same else [Finding("state dict", "built on the meta device and loaded, it computes something else")]

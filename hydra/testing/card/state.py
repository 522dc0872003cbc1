"""What a layer may keep: parameters, and nothing from one call to the next. And whether it runs at every length.

B batch, T tokens, D model width.
"""

import torch

from hydra.attention.checks.subject import Finding, Subject, call_layer, find_smallest, run_layer
from hydra.attention.custom import refuse_hidden_tensors
from hydra.errors import ConfigError


def check_lengths(subject: Subject) -> list[Finding]:
    """Every length, from one token on, runs and gives finite outputs of its own shape and dtype.

    Lengths that do not are left out of what follows.
    """
    lengths = [n_tokens for n_tokens in subject.lengths if subject.failure(n_tokens)]
    if not lengths:
        return []
    last = max((n_tokens for n_tokens in subject.lengths if n_tokens < lengths[0]), default=0)
    first = next(filter(None, map(subject.failure, range(last + 1, lengths[0] + 1))))
    if len(lengths) == len(subject.lengths):
        return [Finding(first.property, f"{first.what}, at every length", first.smallest_t)]
    also = f"; so does T = {', '.join(map(str, lengths[1:6]))}, ..." if len(lengths) > 1 else ""
    name = "T = 1" if lengths == [1] else "odd lengths" if all(n % 2 for n in lengths) else "lengths"
    return [Finding(name, first.what + also, first.smallest_t)]


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
            if subject.failure(n_others) is None:
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
            return [Finding("state dict", f"built on the meta device and loaded, it {subject.describe(error)}")]
    return [] if same else [Finding("state dict", "built on the meta device and loaded, it computes something else")]

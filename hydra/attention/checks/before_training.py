"""What is looked at before a run trains a class of one's own: whether it runs, and sees nothing that it must not see.

A loss means nothing where a layer sees the tokens that it is to predict. These are the checks by perturbation of the
card of hydra.testing, at few short lengths, with the widths of the run. B batch, T tokens, D model width.
"""

import functools
import shlex
from collections.abc import Iterable

import torch

from hydra.attention.checks.sight import check_later_tokens, check_other_documents
from hydra.attention.checks.subject import Subject, one_thread
from hydra.attention.code import CustomSpec, load_class
from hydra.attention.spec import AttentionSpec
from hydra.errors import ConfigError

SHORT_LENGTHS = (2, 3, 8, 16, 18, 33, 64, 65)
"""Around what a class may cut its work into; the smallest T between two of them is searched for."""


def check_before_training(specs: Iterable[AttentionSpec], context_length: int) -> None:
    """Return if every class of one's own runs and sees neither later tokens nor other documents.

    Args:
        specs: of the layers of a model; layers of one class and the same options are looked at once.
        context_length: tokens of the rows that it is to train on.
    Raises:
        ConfigError: naming what does not hold, the shortest sequence that shows it, and the command to look further.
    """
    kinds: dict[tuple[str, tuple[tuple[str, object], ...]], CustomSpec] = {}
    for spec in specs:
        if isinstance(spec, CustomSpec):
            kinds.setdefault((spec.name, spec.option_items), spec)
    for spec in kinds.values():
        problem = find_problem(spec, context_length)
        if problem:
            raise ConfigError(f"{problem}; all that does not hold is told by: {card_command(spec)}")


@functools.lru_cache(maxsize=256)  # a comparison trains one class in many runs
def find_problem(spec: CustomSpec, context_length: int) -> str | None:
    """What keeps a layer from being trained, in words; None if nothing was found."""
    lengths = tuple(n_tokens for n_tokens in SHORT_LENGTHS if n_tokens <= context_length)
    with torch.random.fork_rng(devices=[]), one_thread():
        try:
            subject = _build_subject(spec, lengths)
        except ConfigError as error:
            return str(error)
        failure = subject.failure_everywhere()
        if failure:
            # Some classes take whole blocks of tokens only, of which a row of the run may have a right number.
            subject.lengths = (context_length,)
            if subject.failure_everywhere():
                return f"an attention class must give finite outputs of shape (B, T, D), but of {spec.name}, {failure}"
        subject.is_stateful = subject.keeps_state()
        seen = check_later_tokens(subject) or check_other_documents(subject)
        if seen:
            return (
                f"an attention class must see neither later tokens nor other documents, but of {spec.name}, {seen[0]}"
            )
    return None


def _build_subject(spec: CustomSpec, lengths: tuple[int, ...]) -> Subject:
    subject = Subject(
        load_class(spec.name, spec.sha256),
        spec.d_model,
        spec.n_heads,
        spec.options,
        layer_index=spec.layer_index,
        n_layers=spec.n_layers,
        dtype=torch.float32,
        lengths=lengths,
    )
    subject.build()
    return subject


def card_command(spec: CustomSpec) -> str:
    """The command that prints the card of a layer's class, with its options."""
    options = ", ".join(f"{name}={value}" for name, value in spec.option_items)
    return f"python -m hydra.testing {shlex.quote(f'{spec.name}({options})' if options else spec.name)}"

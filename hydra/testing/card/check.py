"""check_attention: everything that an attention class must do, looked at, on one card."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hydra.attention.checks import sight
from hydra.attention.checks.subject import Finding, Subject, one_thread
from hydra.attention.code import MISTAKES, load_class, read_code, split_name
from hydra.attention.spec import check_known
from hydra.testing.card import costs, numbers, state

WIDTH = 84
LENGTHS_ROW = "T = 1, odd and other lengths"
PROPERTIES: tuple[tuple[str, Callable[[Subject], list[Finding]]], ...] = (
    ("repeats: no chance, no state between calls", state.check_repeats),
    ("state dict holds all", state.check_state_dict),
    ("causality", sight.check_causality),
    ("prefix agreement", sight.check_prefixes),
    ("documents", sight.check_documents),
    ("left padding", sight.check_padding),
    ("batch independence", sight.check_batch),
    ("gradcheck in float64", numbers.check_gradients),
    ("gradient to every parameter", numbers.check_parameters),
)


def _compare_precision(subject: Subject) -> tuple[list[Finding], str]:
    return numbers.check_precision(subject, Subject("gqa", subject.d_model, subject.n_heads, {}))


def _describe_order(subject: Subject) -> tuple[list[Finding], str]:
    try:
        order, numbers_matter = sight.sees_order(subject)
    except MISTAKES as error:
        return [Finding("order and positions", subject.describe(error))], ""
    seen = "matters" if order else "does not matter: a set of tokens is all it sees"
    return [], f"order of earlier tokens {seen}; positions as numbers {'are' if numbers_matter else 'are not'} read"


FIGURES: dict[str, Callable[[Subject], tuple[list[Finding], str]]] = {
    "bfloat16 error": _compare_precision,
    "scale: output over input": numbers.check_scale,
    "graph": costs.check_compilation,
    "FLOPs": costs.describe_flops,
    "memory": costs.describe_memory,
    "order and positions": _describe_order,
}


@dataclasses.dataclass(frozen=True)
class AttentionCard:
    """What check_attention saw. `str()` is the card."""

    name: str
    rows: tuple[tuple[str, str], ...]
    """Property or cost, and what holds or was measured."""
    findings: tuple[Finding, ...]
    """What does not hold."""
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return not self.findings

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows) + 2
        lines = [f"attention card: {self.name}", "-" * WIDTH]
        lines += [f"{name:<{width}}{text}" for name, text in self.rows]
        lines += ["-" * WIDTH]
        verdict = "everything holds" if self.ok else f"{len(self.findings)} findings"
        lines += [f"{verdict}; {self.seconds:.1f} s", *(f"  {finding}" for finding in self.findings)]
        return "\n".join(lines)


def check_attention(
    attention: type | str, *, d_model: int = 32, n_heads: int = 4, options: dict[str, Any] | None = None
) -> AttentionCard:
    """Look at everything an attention class must do, and measure what it costs.

    Args:
        attention: a class with `__init__(spec)` and `forward(x_BTD, positions_BT, document_ids_BT)`, its
            `path.py:Class`, or the name of a backend.
        d_model, n_heads: of the layers, where a property does not need others.
        options: other than the class's defaults.
    Raises:
        ConfigError: there is no such class, or it cannot be built.
    """
    began = time.perf_counter()
    found = _find(attention)
    if isinstance(found, type):
        check_known("option", options or {}, getattr(found, "options", {}))
    subject = Subject(found, d_model, n_heads, options or {})
    rows: list[tuple[str, str]] = []
    findings: list[Finding] = []

    def note(name: str, found: list[Finding], text: str = "holds") -> None:
        # One mistake in forward may end several checks; it is one finding.
        fresh = [finding for finding in found if finding.what not in {known.what for known in findings}]
        if found:
            text = f"FAILS: {'; '.join(map(str, fresh[:2]))}" if fresh else f"not run: {found[0].brief()}, as above"
        rows.append((name, text))
        findings.extend(fresh)

    with torch.random.fork_rng(devices=[]), one_thread():
        subject.build()
        note(LENGTHS_ROW, _safely(state.check_lengths, subject))
        nowhere = subject.failure_everywhere()
        if nowhere:
            rows += [(name, f"not run: forward {nowhere.brief()}") for name in (*dict(PROPERTIES), *FIGURES)]
        else:
            somewhere = "holds, at lengths that run" if findings else "holds"
            for name, check in PROPERTIES:
                note(name, _safely(check, subject), somewhere)
            for name, measure in FIGURES.items():
                note(name, *measure(subject))
        rows.append(("cache", costs.describe_cache(subject)))
    return AttentionCard(subject.name, tuple(rows), tuple(findings), time.perf_counter() - began)


def _find(attention: type | str) -> type | str:
    names = split_name(attention) if isinstance(attention, str) else None
    if names is None:
        return attention
    assert isinstance(attention, str)
    return load_class(attention, read_code(Path(names[0]), names[1])[0])


def _safely(check: Callable[[Subject], list[Finding]], subject: Subject) -> list[Finding]:
    try:
        return check(subject)
    except MISTAKES as error:
        return [Finding(check.__name__.removeprefix("check_").replace("_", " "), subject.describe(error))]

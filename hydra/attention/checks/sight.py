"""What an output may depend on: nothing later, nothing of another document, nothing of another row.

B batch, T tokens, D model width.
"""

import itertools

import torch
from torch import Tensor

from hydra.attention.checks.subject import Finding, Subject, find_smallest


def check_causality(subject: Subject) -> list[Finding]:
    """Outputs before a token do not change with it, nor does a gradient of theirs reach it."""
    return [*check_later_tokens(subject), *check_later_gradients(subject)]


def check_later_tokens(subject: Subject) -> list[Finding]:
    """Outputs before a token do not change with it."""

    def perturbed(n_tokens: int) -> str | None:
        x_BTD = subject.inputs(1, n_tokens)
        with torch.no_grad():
            out_BTD = subject.run(x_BTD)
            for cut in sorted(cuts(n_tokens), reverse=True):
                changed_BTD = x_BTD.clone()
                changed_BTD[:, cut:] += 1.0 + subject.inputs(1, n_tokens - cut, seed=1)
                changed_out_BTD = subject.run(changed_BTD)
                if subject.differs(changed_out_BTD[:, :cut], out_BTD[:, :cut]):
                    where = subject.places(changed_out_BTD[0, :cut], out_BTD[0, :cut])
                    return f"outputs at {where} change when tokens from {cut} on do"
        return None

    return find_smallest(subject, "causality by perturbation", perturbed, minimum=2)


def check_later_gradients(subject: Subject) -> list[Finding]:
    """No gradient of outputs before a token reaches it."""

    def by_gradient(n_tokens: int) -> str | None:
        x_BTD = subject.inputs(1, n_tokens).requires_grad_()
        for cut in sorted(cuts(n_tokens), reverse=True):
            out_BTD = subject.run(x_BTD)
            if not out_BTD.requires_grad:
                return None
            (grad_BTD,) = torch.autograd.grad(out_BTD[:, :cut].square().sum(), x_BTD, allow_unused=True)
            if grad_BTD is not None and subject.differs(grad_BTD[:, cut:], torch.zeros_like(grad_BTD[:, cut:])):
                where = subject.places(grad_BTD[0, cut:], torch.zeros_like(grad_BTD[0, cut:]))
                return f"the gradient of outputs before {cut} reaches tokens {cut} + {where}"
        return None

    return find_smallest(subject, "causality by gradient", by_gradient, minimum=2)


def cuts(n_tokens: int) -> set[int]:
    """Where a sequence is cut into earlier and later tokens."""
    return {n_tokens - 1, n_tokens // 2, max(1, n_tokens // 2 - 1), 1}


def check_prefixes(subject: Subject) -> list[Finding]:
    """A shorter run gives the beginning of a longer one."""

    def look(n_tokens: int) -> str | None:
        x_BTD = subject.inputs(1, n_tokens)
        out_BTD = subject.run(x_BTD)
        for n_prefix in {n_tokens - 1, max(1, n_tokens // 2)}:
            if subject.failure(n_prefix):
                continue
            prefix_BTD = subject.run(x_BTD[:, :n_prefix])
            if subject.differs(out_BTD[:, :n_prefix], prefix_BTD):
                where = subject.places(out_BTD[0, :n_prefix], prefix_BTD[0])
                return f"outputs at {where} are others in a run of {n_prefix}"
        return None

    with torch.no_grad():
        return find_smallest(subject, "prefix agreement", look, minimum=2)


def check_documents(subject: Subject) -> list[Finding]:
    """Packed documents do not reach each other, and each gives what it gives alone at the same positions."""
    return check_other_documents(subject) or check_documents_alone(subject)


def check_other_documents(subject: Subject) -> list[Finding]:
    """Outputs of a packed document do not change with another."""

    def perturbed(n_tokens: int) -> str | None:
        x_BTD = subject.inputs(1, n_tokens)
        for lengths in splits(n_tokens):
            for ids_BT in (document_ids(*lengths), -document_ids(*lengths)):
                out_BTD = subject.run(x_BTD, ids_BT)
                for document, (begins, ends) in enumerate(bounds(lengths)):
                    changed_BTD = x_BTD.clone()
                    changed_BTD[:, begins:ends] += 1.0 + subject.inputs(1, ends - begins, seed=1)
                    changed_BTD = subject.run(changed_BTD, ids_BT)
                    is_other_T = torch.ones(n_tokens, dtype=torch.bool)
                    is_other_T[begins:ends] = False
                    if subject.differs(changed_BTD[:, is_other_T], out_BTD[:, is_other_T]):
                        return f"of documents of {said(lengths)} tokens, another changes with number {document}"
        return None

    with torch.no_grad():
        return find_smallest(subject, "documents", perturbed, minimum=2)


def check_documents_alone(subject: Subject) -> list[Finding]:
    """A packed document gives what it gives alone at the same positions."""

    def alone(n_tokens: int) -> str | None:
        x_BTD = subject.inputs(1, n_tokens)
        for lengths in splits(n_tokens):
            out_BTD = subject.run(x_BTD, document_ids(*lengths))
            for begins, ends in bounds(lengths):
                if subject.failure(ends - begins):
                    continue
                alone_BTD = subject.run(x_BTD[:, begins:ends], positions_BT=torch.arange(begins, ends)[None])
                if subject.differs(out_BTD[:, begins:ends], alone_BTD):
                    return f"the document of tokens {begins} to {ends - 1} is another than alone at the same positions"
        return None

    with torch.no_grad():
        return find_smallest(subject, "positions", alone, minimum=2)


def splits(n_tokens: int) -> list[tuple[int, ...]]:
    """Lengths of documents that a row is packed with."""
    in_two = {(n_first, n_tokens - n_first) for n_first in (1, n_tokens // 2, n_tokens - 1)}
    return [*sorted(in_two), *([(1, n_tokens - 2, 1)] if n_tokens > 2 else [])]


def bounds(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Where each document begins and ends."""
    ends = list(itertools.accumulate(lengths))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def said(lengths: tuple[int, ...]) -> str:
    """Lengths in words."""
    return f"{', '.join(map(str, lengths[:-1]))} and {lengths[-1]}"


def check_padding(subject: Subject) -> list[Finding]:
    """Rows padded on the left, each by its own length and as a document of its own, give what they give unpadded."""

    def look(n_tokens: int) -> str | None:
        x_BTD = subject.inputs(2, n_tokens)
        for n_padding in sorted({1, n_tokens // 2, n_tokens - 1}):
            ids_BT = torch.cat([document_ids(0, n_tokens), document_ids(n_padding, n_tokens - n_padding)])
            out_BTD = subject.run(x_BTD, ids_BT)
            for row, begins in ((0, 0), (1, n_padding)):
                if subject.failure(n_tokens - begins):
                    continue
                positions_BT = torch.arange(begins, n_tokens)[None]
                alone_BTD = subject.run(x_BTD[row : row + 1, begins:], positions_BT=positions_BT)
                if subject.differs(out_BTD[row : row + 1, begins:], alone_BTD):
                    return f"row {row}, padded by {begins} beside one padded by {n_padding - begins}, is another alone"
        return None

    with torch.no_grad():
        return find_smallest(subject, "padding", look, minimum=2)


def check_batch(subject: Subject) -> list[Finding]:
    """A row gives the same beside any other rows, and alone."""

    def look(n_tokens: int) -> str | None:
        x_BTD = subject.inputs(3, n_tokens)
        out_BTD = subject.run(x_BTD)
        changed_BTD = x_BTD.clone()
        changed_BTD[1] = changed_BTD[1] * 3.0 + 1.0
        if subject.differs(subject.run(changed_BTD)[[0, 2]], out_BTD[[0, 2]]):
            return "rows 0 and 2 change with row 1"
        if subject.differs(subject.run(x_BTD[1:2]), out_BTD[1:2]):
            return "row 1 is another alone"
        return None

    with torch.no_grad():
        return find_smallest(subject, "batch independence", look, maximum=36)


def document_ids(*lengths: int) -> Tensor:
    """Ids of one row that holds documents of these lengths, (1, T): neither in order nor from 0 on."""
    return torch.repeat_interleave(torch.tensor([7, 3, 5][: len(lengths)]), torch.tensor(lengths))[None]


def sees_order(subject: Subject, n_tokens: int = 9) -> tuple[bool, bool]:
    """Whether the last output depends on the order of the tokens before it, and on positions as numbers."""
    n_tokens = subject.usable(n_tokens)
    x_BTD = subject.inputs(1, n_tokens)
    with torch.no_grad():
        last_BD = subject.run(x_BTD)[:, -1]
        turned_BTD = torch.cat([x_BTD[:, :-1].flip(1), x_BTD[:, -1:]], dim=1)
        stretched = subject.run(x_BTD, positions_BT=3 * torch.arange(n_tokens)[None])[:, -1]
        return subject.differs(subject.run(turned_BTD)[:, -1], last_BD), subject.differs(stretched, last_BD)

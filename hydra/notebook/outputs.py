"""What a cell may leave in the notebook: streams as a terminal would show them, and no more than its share of bytes."""

from collections.abc import Mapping, Sequence

from nbformat import NotebookNode
from nbformat.v4 import new_output

MAX_OUTPUT_BYTES = 1_000_000
MAX_SHOWN_ERRORS = 4_000  # characters
MAX_TRACEBACK = 100_000  # characters


class Share:
    """The bytes of output that one cell may leave. Where it ends stands a note of how much was cut."""

    def __init__(self, n_bytes: int) -> None:
        """Nothing has been left yet."""
        self._n_bytes = n_bytes
        self._kept = 0
        self._cut = 0
        self._note = new_output("stream", name="stdout", text="")

    def add_stream(self, outs: list[NotebookNode], name: str, text: str) -> None:
        """Merge what was printed into the outputs, as far as there is room."""
        printed = text.encode(errors="replace")
        kept = printed[: self._room]
        if kept:
            self._kept += len(kept)
            _append_stream(outs, name, kept.decode(errors="ignore"))
        if len(kept) < len(printed):
            self._add_cut(len(printed) - len(kept), outs)

    def has_room_for(self, data: Mapping[str, object], outs: list[NotebookNode]) -> bool:
        """Whether the forms of a display may be kept, which then counts them; half a picture is none."""
        if _size(data) > self._room:
            self._add_cut(_size(data), outs)
            return False
        self._kept += _size(data)
        return True

    def exchange(self, old: Sequence[Mapping[str, object]], new: Mapping[str, object]) -> Mapping[str, object]:
        """What may stand in the place of each `old` display: `new`, or a word on why it may not."""
        left = self._kept - sum(map(_size, old))
        if left + len(old) * _size(new) > self._n_bytes:
            new = {
                "text/plain": f"[HYDRA left out a display of {_size(new):,} bytes: a cell may leave {self._n_bytes:,}]"
            }
        self._kept = left + len(old) * _size(new)
        return new

    @property
    def _room(self) -> int:
        """None once something was cut: what is kept is a beginning, and nothing that came later."""
        return 0 if self._cut else self._n_bytes - self._kept

    def _add_cut(self, n_bytes: int, outs: list[NotebookNode]) -> None:
        """The note is an output of its own, so that what was kept is not copied for each line that follows."""
        if not self._cut:
            outs.append(self._note)
        self._cut += n_bytes
        self._note.text = (
            f"\n[HYDRA cut the output of this cell here: {self._cut:,} bytes more, and a cell may leave "
            f"{self._n_bytes:,}; papermill's --stdout-file keeps all that is printed]\n"
        )


def bound_error(content: Mapping[str, object]) -> dict[str, object]:
    """An error as it may stand in a notebook: its message may hold anything, such as a tensor or a whole page."""
    lines = content["traceback"]
    assert isinstance(lines, list)
    traceback = "\n".join(lines)
    return {
        **content,
        "evalue": shorten(str(content["evalue"]), MAX_SHOWN_ERRORS),
        "traceback": lines if len(traceback) <= MAX_TRACEBACK else [shorten(traceback, MAX_TRACEBACK)],
    }


def shorten(text: str, length: int) -> str:
    """The text, or its beginning and its end with a word on what is missing between them."""
    if len(text) <= length:
        return text
    half = length // 2
    return f"{text[:half]}\n[HYDRA cut {len(text) - 2 * half:,} characters here]\n{text[-half:]}"


def _size(data: Mapping[str, object]) -> int:
    """Bytes that the forms of a display take in a notebook, about."""
    return len(str(data).encode(errors="replace"))


def _append_stream(outs: list[NotebookNode], name: str, text: str) -> None:
    """Merge into the stream of that name behind the last figure, as a terminal would show it (\\r and \\b applied)."""
    for out in reversed(outs):
        if out.output_type != "stream":
            break
        if out.name == name:
            head, newline, line = out.text.rpartition("\n")
            out.text = head + newline + _as_terminal(line + text)
            return
    outs.append(new_output("stream", name=name, text=_as_terminal(text)))


def _as_terminal(text: str) -> str:
    """What a terminal would show of `text`; in linear time, for a line of a megabyte too."""
    if "\b" in text:
        shown: list[str] = []
        for character in text:
            if character != "\b":
                shown.append(character)
            elif shown and shown[-1] != "\n":
                shown.pop()
        text = "".join(shown)
    return "\n".join(map(_overwrite, text.split("\n"))) if "\r" in text else text


def _overwrite(line: str) -> str:
    """Only what was written behind the last carriage return; one at the end overwrites when something follows."""
    kept = line.rstrip("\r")
    return kept.rpartition("\r")[2] + line[len(kept) :]

"""What a cell may leave in the notebook: streams as a terminal would show them, and no more than its share of bytes."""

from collections.abc import Mapping, Sequence

from nbformat import NotebookNode
from nbformat.v4 import new_output

from hydra.runtime.secrets import mask, n_begun

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
        """Merge what was printed into the outputs, as far as there is room; what is overwritten takes none."""
        if self._cut:
            self._add_cut(_n_bytes(text), outs)
            return
        out = _open_stream(outs, name)
        head, newline, line = out.text.rpartition("\n")
        shown = _as_terminal(line + text)
        n_more = _n_bytes(shown) - _n_bytes(line)
        if n_more > self._room:
            room = self._room
            # Masked first: half a secret, at the end, would not be found any more.
            beginning = mask(shown).encode(errors="replace")[: _n_bytes(line) + room].decode(errors="ignore")
            self._add_cut(_n_bytes(shown) - _n_bytes(beginning), outs)
            shown, n_more = beginning[: len(beginning) - n_begun(beginning)], room
        out.text = head + newline + shown
        self._kept += n_more
        if not out.text:
            outs.remove(out)

    def has_room_for(self, display: Mapping[str, object], outs: list[NotebookNode]) -> bool:
        """Whether a display may be kept, which then counts it; half a picture is none."""
        if _size(display) > self._room:
            self._add_cut(_size(display), outs)
            return False
        self._kept += _size(display)
        return True

    def has_room_to_exchange(self, old: Sequence[Mapping[str, object]], new: Mapping[str, object]) -> bool:
        """Whether the display `new` may stand in the place of each `old` one."""
        return self._kept + _growth(old, new) <= self._n_bytes

    def exchange(self, old: Sequence[Mapping[str, object]], new: Mapping[str, object]) -> None:
        """Count the display `new` in the place of each `old` one."""
        self._kept += _growth(old, new)

    def add_error(self, outs: list[NotebookNode], error: NotebookNode) -> None:
        """Keep an error. The last one stays whatever room there is: it says how the cell ended."""
        before = next((out for out in reversed(outs) if out.output_type == "error"), None)
        if before is None or _size(error) <= self._room:
            self._kept += _size(error)
            outs.append(error)
        else:
            self._add_cut(_size(before), outs)
            before.update(error)

    @property
    def _room(self) -> int:
        """None once something was cut: what is kept is a beginning, and nothing that came later."""
        return 0 if self._cut else max(0, self._n_bytes - self._kept)

    def _add_cut(self, n_bytes: int, outs: list[NotebookNode]) -> None:
        """The note is an output of its own, so that what was kept is not copied for each line that follows."""
        if not self._cut:
            for out in outs:  # the rest of a secret may be in what is cut
                if out.output_type == "stream":
                    out.text = out.text[: len(out.text) - n_begun(out.text)]
            outs.append(self._note)
        self._cut += n_bytes
        self._note.text = (
            f"\n[HYDRA cut the output of this cell here: {self._cut:,} bytes more, and a cell may leave "
            f"{self._n_bytes:,}; papermill's --stdout-file keeps all that is printed]\n"
        )


def left_out(display: Mapping[str, object], n_bytes: int) -> dict[str, object]:
    """A word in the place of a display for which there is no room in the `n_bytes` of a cell."""
    text = f"[HYDRA left out a display of {_size(display):,} bytes: a cell may leave {n_bytes:,}]"
    return {"data": {"text/plain": text}, "metadata": {}}


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


def _size(output: Mapping[str, object]) -> int:
    """Bytes that it takes in a notebook, about."""
    kept = {key: output[key] for key in ("data", "metadata", "ename", "evalue", "traceback") if key in output}
    return _n_bytes(str(kept))


def _growth(old: Sequence[Mapping[str, object]], new: Mapping[str, object]) -> int:
    return len(old) * _size(new) - sum(map(_size, old))


def _n_bytes(text: str) -> int:
    return len(text.encode(errors="replace"))


def _open_stream(outs: list[NotebookNode], name: str) -> NotebookNode:
    """The stream of that name behind the last figure, to be written on; a new one if there is none."""
    for out in reversed(outs):
        if out.output_type != "stream":
            break
        if out.name == name:
            return out
    outs.append(new_output("stream", name=name, text=""))
    return outs[-1]


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

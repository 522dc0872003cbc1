"""Small pieces of HTML for notebooks and reports. Every text is escaped; nothing refers outside the page."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import click

MAX_TABLE_ROWS = 40
MARKED = ' class="marked"'


@dataclass(frozen=True)
class Section:
    """A piece of a notebook or report: HTML, and the same in words for where HTML is not shown.

    `name` stands in the HTML, so that a report sees which pieces its notebook has already shown.
    """

    name: str
    body: str
    text: str

    @property
    def marker(self) -> str:
        """What tells this section in a notebook's output."""
        return f'data-hydra="{self.name}"'

    def to_html(self) -> str:
        """The section as HTML."""
        return f"<div {self.marker}>{self.body}</div>"

    def show(self) -> None:
        """Display it as the output of a notebook cell; in words where there is no notebook."""
        from IPython.core.getipython import get_ipython
        from IPython.display import display

        if get_ipython() is None:
            click.echo(self.text)
            return
        display({"text/html": self.to_html(), "text/plain": self.text}, raw=True)


def empty_section(name: str, sentence: str) -> Section:
    """A section that says why there is nothing to show yet."""
    return Section(name, f"<p>{escape(sentence)}</p>", sentence)


def escape(value: object) -> str:
    """The value as text that means itself in HTML, in attributes too."""
    return html.escape(str(value), quote=True)


def format_number(value: object) -> str:
    """A number to be read: 1,234,567, 1.462, 3e-04; a dash for None. Anything else as it is."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value != 0 and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.2e}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def format_bytes(n_bytes: object) -> str:
    """A size in bytes, as 20.4 MB."""
    size = float(str(n_bytes))
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def table(
    header: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", marked: frozenset[int] = frozenset()
) -> str:
    """A table; the first column names the row. Rows whose index is in `marked` stand out."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(
        f"<tr{MARKED if index in marked else ''}>"
        f'<th scope="row">{escape(format_number(first))}</th>'
        + "".join(f"<td>{escape(format_number(value))}</td>" for value in rest)
        + "</tr>"
        for index, (first, *rest) in enumerate(rows)
    )
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{told}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def tiles(values: Mapping[str, object]) -> str:
    """Names and values side by side, for the few that matter most."""
    inner = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(format_number(value))}</dd></div>" for name, value in values.items()
    )
    return f'<dl class="tiles">{inner}</dl>'


def facts(values: Mapping[str, object]) -> str:
    """Names and values as a table without a header."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(format_number(value))}</td></tr>'
        for name, value in values.items()
    )
    return f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'


def figure(png: bytes, alternative: str, caption: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A picture with alternative text, and its data in a table that opens (evenly thinned to MAX_TABLE_ROWS rows)."""
    shown = thin(rows, MAX_TABLE_ROWS)
    note = f"{len(shown)} of {len(rows)} rows" if len(shown) < len(rows) else ""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return (
        f'<figure style="margin:0 0 1.5em"><figcaption>{escape(caption)}</figcaption>'
        f'<img src="{source}" alt="{escape(alternative)}" style="max-width:100%;height:auto;width:560px">'
        f"<details><summary>Data: {escape(caption)}</summary>{table(header, shown, note)}</details></figure>"
    )


def thin(rows: Sequence[Sequence[object]], limit: int) -> list[Sequence[object]]:
    """At most `limit` rows, evenly spread, the first and the last among them."""
    if len(rows) <= limit:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / (limit - 1))] for index in range(limit)]

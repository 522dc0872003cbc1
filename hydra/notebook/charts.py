"""Pictures as PNG bytes, drawn with matplotlib: light ground, few colours, type that a phone shows readably."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image

# Two of Okabe and Ito's colours, told apart by colour-blind readers and in grey.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#9a9a9a"
SIZE_INCHES = (4.8, 3.0)
DPI = 200
MAX_POINTS = 2000
N_COLOURS = 48


@dataclass(frozen=True)
class Line:
    """One line of a chart; x are optimizer steps."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    is_sparse: bool = False


def line_chart(lines: Sequence[Line], y_label: str, *, starts_at_zero: bool = False) -> bytes:
    """Lines over optimizer steps; one with few points shows them."""
    figure, axes = _axes()
    for line, colour in zip(lines, (BLUE, VERMILION), strict=False):
        x, y = decimate(line.x, line.y)
        axes.plot(
            x, y, color=colour, label=line.label, linewidth=1.6, marker="o" if line.is_sparse else None, markersize=4
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if max(max(line.y) for line in lines) >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if starts_at_zero:
        axes.set_ylim(bottom=0)
    if len(lines) > 1:
        axes.legend(frameon=False)
    return _png(figure)


def bar_chart(names: Sequence[str], values: Sequence[float], x_label: str, highlighted: int) -> bytes:
    """Horizontal bars with their values, the first on top."""
    figure, axes = _axes()
    colours = [BLUE if index == highlighted else GREY for index in range(len(names))]
    bars = axes.barh(range(len(names)), values, color=colours)
    axes.bar_label(bars, [f"{value:.3f}" for value in values], padding=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.2)
    axes.set_xlabel(x_label)
    axes.grid(False, axis="y")
    return _png(figure)


def interval_chart(
    names: Sequence[str], values: Sequence[float], intervals: Sequence[tuple[float, float] | None], x_label: str
) -> bytes:
    """Points with their intervals beside a line at zero, the first on top."""
    figure, axes = _axes()
    figure.set_size_inches(SIZE_INCHES[0], 1.2 + 0.42 * len(names))
    for place, (value, interval) in enumerate(zip(values, intervals, strict=True)):
        if interval is not None:
            axes.plot(interval, (place, place), color=GREY, linewidth=2.5, solid_capstyle="butt")
        axes.plot(value, place, "o", color=BLUE, markersize=6)
    axes.axvline(0.0, color=VERMILION, linewidth=1.2)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.grid(False, axis="y")
    return _png(figure)


def decimate(x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most `limit` points that look the same: lowest and highest of every stretch, so that no spike is lost."""
    if len(x) <= limit:
        return list(x), list(y)
    n_stretches = limit // 2
    edges = [round(index * len(x) / n_stretches) for index in range(n_stretches + 1)]
    kept: list[int] = []
    for start, stop in pairwise(edges):
        stretch = range(start, stop)
        kept += sorted({min(stretch, key=lambda i: y[i]), max(stretch, key=lambda i: y[i])})
    return [x[i] for i in kept], [y[i] for i in kept]


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11)
    return figure, axes


def _png(figure: Figure) -> bytes:
    for axes in figure.axes:
        axes.xaxis.label.set_fontsize(11)
        axes.yaxis.label.set_fontsize(11)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    small = io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(N_COLOURS).save(small, format="png", optimize=True)
    return small.getvalue()

"""What sections are written with."""

from collections.abc import Callable, Iterable


def say(text: str) -> None:
    """Progress, on the screen at once."""
    print(f"  {text}", flush=True)


def as_table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Markdown."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def attempt(run: Callable[[], list[str]], n_cells: int, failure: str = "**FAILED**") -> list[str]:
    """The cells that run() returns, or `failure` and why in the first two of n_cells."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001
        # Whatever happens on somebody's machine is a result of the report, beside the other rows.
        why = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
        return [failure, why, *[""] * (n_cells - 2)]

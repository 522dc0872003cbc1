"""`python -m diagnostics.bench [PART ...]`: measure, print, and write benchmarks.json and diagnostics/README.md."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diagnostics.bench import decode, machine, memory, startup, throughput, time_to_loss

HERE = Path(__file__).parents[1]
RESULTS, README = HERE / "benchmarks.json", HERE / "README.md"
DATA_DIR = "data"
TEXT = machine.ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
MARK = "<!-- what `make bench` printed last -->"
METHODS = {"throughput": 3, "time-to-loss": 2, "time-to-loss-10M": 1, "memory": 1, "startup": 1, "decode": 2}
"""To be raised when what a part measures, or what it stores, is changed."""


def main(names: list[str]) -> int:
    """Run the named parts, all without a name; returns the exit status."""
    threads = len(os.sched_getaffinity(0))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def race(part: str, name: str) -> dict[str, Any]:
        # A part that is named takes the recipe's own runs from the last time; a whole benchmark runs everything.
        before = results.get(part) if names else None
        before = before if before and before.get("method") == METHODS[part] else None
        is_same = before is not None and machine.is_same(before["machine"], machine.describe())
        return time_to_loss.run(name, threads, TEXT, before["result"] if before and is_same else None)

    parts: dict[str, tuple[str, Callable[[], dict[str, Any]], Callable[[dict[str, Any]], list[str]]]] = {
        "throughput": ("Tokens per second", lambda: throughput.run(DATA_DIR, threads), throughput.table),
        "time-to-loss": (
            "Time to loss, 0.8 M parameters",
            lambda: race("time-to-loss", "characters-0.8M"),
            time_to_loss.table,
        ),
        "time-to-loss-10M": (
            "Time to the loss that the recipe has after 10 minutes, 10.7 M parameters",
            lambda: race("time-to-loss-10M", "characters-10.7M"),
            time_to_loss.table,
        ),
        "memory": ("Memory", lambda: memory.run(DATA_DIR, threads), memory.table),
        "startup": ("Startup", lambda: startup.run(DATA_DIR, threads), startup.table),
        "decode": ("Decoding", lambda: decode.run(DATA_DIR, threads), decode.table),
    }
    unknown = [name for name in names if name not in parts]
    if unknown:
        print(f"a part must be one of {', '.join(parts)}, but got {unknown[0]}", file=sys.stderr)
        return 2
    for name in names or parts:
        title, measure, _ = parts[name]
        print(f"{title} ...", flush=True)
        try:
            results[name] = {"method": METHODS[name], "machine": machine.describe(), "result": measure()}
        except machine.BusyError as error:
            print(f"refused: {error}", file=sys.stderr)
            return 75
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print("\n".join(section(title, results[name], parts[name][2])), flush=True)
    # Stored by an earlier version of a part, whose figures mean something else; shown again once measured again.
    stale = [name for name in results if results[name].get("method") != METHODS[name]]
    if stale:
        print(f"not shown, since measured by an earlier method: {', '.join(stale)}; run these parts again")
    shown = [
        line
        for name in parts
        if name in results and name not in stale
        for line in section(parts[name][0], results[name], parts[name][2])
    ]
    README.write_text(README.read_text().partition(MARK)[0] + "\n".join([MARK, *shown]).rstrip() + "\n")
    return 0


def section(title: str, stored: dict[str, Any], table: Callable[[dict[str, Any]], list[str]]) -> list[str]:
    """Heading, machine, table."""
    of = stored["machine"]
    said = (
        f"{of['date']}, commit {of['commit']}, {of['processor']}, {of['n_cores']} cores, "
        f"AVX512-BF16 {'yes' if of['avx512_bf16'] else 'no'}, AMX {'yes' if of['amx'] else 'no'}, torch {of['torch']}"
    )
    return ["", f"### {title}", "", said, "", *table(stored["result"])]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

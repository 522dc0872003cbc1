"""The progress of a batch run, drawn on the terminal from the run directory."""

import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from tqdm import tqdm

from hydra.runtime import Run, RunStatus

LINE_EVERY_S = 15.0
SHARE_OF_TIME = 0.05


def last_training_record(records: Sequence[Mapping[str, object]]) -> Mapping[str, object]:
    """The newest record with a training loss, or {}."""
    return next((record for record in reversed(records) if "loss_nats" in record), {})


def seconds_left(status: RunStatus, record: Mapping[str, object]) -> float | None:
    """Time to the end at the newest record's pace, or that of all runs so far, in seconds; None before there is one."""
    if status.unit == "run":
        return (status.max_steps - status.step) * status.train_s / status.step if status.step else None
    step_ms = record.get("step_ms")
    return None if not isinstance(step_ms, int | float) else (status.max_steps - status.step) * step_ms / 1000


def describe(status: RunStatus, record: Mapping[str, object]) -> str:
    """One line: step, loss, speed, time left."""
    parts = [f"{status.unit} {status.step}/{status.max_steps}"]
    if status.unit == "run" or (status.is_alive and status.stage != "training"):
        parts.append(status.stage)
    if "loss_nats" in record:
        parts.append(f"loss {record['loss_nats']:.4f}")
    if "tokens_per_s" in record:
        parts.append(f"{record['tokens_per_s']:,.0f} tokens/s")
    left = seconds_left(status, record)
    if left is not None and status.is_alive and status.step < status.max_steps:
        parts.append(f"{format_duration(left)} left")
    return " | ".join(parts)


def format_duration(seconds: float) -> str:
    """As 42 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """A thread that reads the run directory and draws a bar on a terminal, or else prints a line now and then."""

    def __init__(self, run: Run, n_cells: int, *, shown: bool) -> None:
        """Nothing is drawn before it is entered, and nothing at all unless `shown`."""
        self._run = run
        self._n_cells = n_cells
        self._shown = shown
        self._cell = 0
        self._told = ""
        self._has_begun = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="hydra-progress", daemon=True)

    def __enter__(self) -> Self:
        """Begin to draw."""
        if self._shown:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Draw the last state and end."""
        self._ended.set()
        if self._shown:
            self._thread.join()

    def begin_cell(self, index: int) -> None:
        """Note which cell is executed (0-based)."""
        self._cell = index

    def _draw(self) -> None:
        # A terminal may have no width (some job runners' have none); a bar would not show there.
        if not sys.stderr.isatty() or os.get_terminal_size(sys.stderr.fileno()).columns == 0:
            self._print_lines()
            return
        with tqdm(total=0, file=sys.stderr, dynamic_ncols=True, bar_format="{desc}") as bar:
            while not self._ended.wait(self._look(bar)):
                pass
            self._look(bar)

    def _look(self, bar: tqdm) -> float:
        """Draw once; returns the seconds to wait, so that reading a long run takes a small share of the time."""
        began = time.monotonic()
        status, line = self._line()
        self._tell(status)
        if status.step:
            bar.bar_format = "{desc} {percentage:3.0f}%|{bar}|"
            bar.total, bar.n = status.max_steps, status.step
        bar.set_description_str(line, refresh=False)
        bar.refresh()
        return max(0.5, (time.monotonic() - began) / SHARE_OF_TIME)

    def _print_lines(self) -> None:
        printed = ""
        while not self._ended.wait(LINE_EVERY_S if printed else 0.5):
            status, line = self._line()
            self._tell(status)
            if line != printed:
                printed = line
                tqdm.write(line, file=sys.stderr)

    def _tell(self, status: RunStatus) -> None:
        """Print once, above all else, what a run at work has to say of itself."""
        if status.is_alive and status.message and status.message != self._told:
            self._told = status.message
            tqdm.write(status.message, file=sys.stderr)

    def _line(self) -> tuple[RunStatus, str]:
        status = self._run.status()
        parts = [f"cell {self._cell + 1}/{self._n_cells}"]
        self._has_begun |= status.is_alive
        if status.status in ("failed", "interrupted") and not self._has_begun:
            parts.append(f"goes on from {status.unit} {status.step}/{status.max_steps}")
        elif status.step or (status.is_alive and status.unit == "run" and status.max_steps):
            parts.append(describe(status, last_training_record(self._run.metrics())))
        elif status.is_alive:
            # Preparing data may take long and has no steps to count: say what its log said last.
            said = self._run.log_tail(1).split(": ", 1)[1:] if status.stage == "preparing data" else []
            parts.append(": ".join([status.stage, *said])[:100])
        return status, " | ".join(parts)

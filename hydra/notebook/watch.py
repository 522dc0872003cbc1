"""`watch(run)`: follow a run from a notebook cell. Watching starts, stops and changes nothing."""

import time

import click

from hydra.notebook.figures import loss_section
from hydra.notebook.progress import describe, format_duration, last_training_record
from hydra.runtime import Run, RunStatus

POLL_S = 0.5
MIN_LINE_EVERY_S, MAX_LINE_EVERY_S = 5.0, 60.0
LINES_SHARE = 0.02
BEGIN_WITHIN_S = 120.0


def watch(run: Run) -> None:
    """Print where the run stands every few seconds until it ends, then leave one figure of its loss, if it has one.

    A run that failed or was cut off is told, not raised: the cells behind show what there is, and
    `run.raise_for_status()` raises. Ctrl-C, or the stop button, ends the watching and not the run.
    """
    try:
        status = _follow(run)
    except KeyboardInterrupt:
        status = run.status()
        if status.is_alive:
            click.echo(
                f"stopped watching at {status.unit} {status.step}; the run goes on as process {status.pid}. "
                "watch(run) follows it again, run.stop() ends it."
            )
    else:
        click.echo(_last_line(run, status))
    if status.unit == "step":
        loss_section(run).show()


def _follow(run: Run) -> RunStatus:
    """Print until nobody trains the run any more; returns its last status."""
    began = time.monotonic()
    next_line = began
    printed, told = "", None
    while True:
        status = run.status()
        waited = time.monotonic() - began
        if status.status == "queued" and waited > BEGIN_WITHIN_S:
            click.echo(f"no trainer has begun within {BEGIN_WITHIN_S:.0f} s; see {run.directory / 'trainer.log'}")
            return status
        if status.status not in ("queued", "running"):
            return status
        if status.message and status.message != told:
            click.echo(status.message)
            told = status.message
        line = (
            describe(status, last_training_record(run.metrics()))
            if status.step or status.unit == "run"
            else status.stage
        )
        if time.monotonic() >= next_line and line != printed:
            click.echo(line)
            printed = line
            next_line = time.monotonic() + min(MAX_LINE_EVERY_S, max(MIN_LINE_EVERY_S, LINES_SHARE * waited))
        time.sleep(POLL_S)


def _last_line(run: Run, status: RunStatus) -> str:
    head = f"{run.name} is {status.status} at {status.unit} {status.step} of {status.max_steps}"
    head += f", {format_duration(status.train_s)} in all"
    if status.val_bits_per_byte is not None:
        head += f"; validation {status.val_bits_per_byte:.3f} bits per byte"
    if status.status == "done":
        return head
    reason = ": ".join(part for part in (status.cause, status.message) if part)
    return f"{head}\n{reason}\n{run.log_tail(15)}"

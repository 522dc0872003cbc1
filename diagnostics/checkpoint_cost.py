"""What does it cost a run that nothing of it is lost? In a quiet machine's wall time:

    python -m diagnostics.checkpoint_cost

First the `debug` preset with its default intervals, in this process: the share of its steps' time that goes into
checkpoints, metrics, ledger, the search for what is not finite, and the guard. Then real runs with the weights and the
optimizer of the `100M` preset, on few tokens so that their steps are short: what a checkpoint adds to the time from one
step's end to that of the next, written at once and in the background. There it is written by and by, after many steps;
what it takes from all of them together is told too.
"""

import contextlib
import dataclasses
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from diagnostics.bench.machine import ROOT, describe, wait_until_quiet
from hydra.runtime import paths
from hydra.runtime.guard import SpikeGuard
from hydra.runtime.ledger import Ledger
from hydra.runtime.memory.plan import read_plan
from hydra.runtime.records import read_records
from scripts.config import TrainingConfig
from scripts.trainer import Trainer

MAX_SHARE = 0.01
MAX_ADDED_S = 0.150
N_STEPS = 400
# Cycles, and steps in each: the first follows a checkpoint, the LAST ones tell what a step takes.
AT_ONCE, IN_BACKGROUND = (6, 6), (4, 70)
LAST = 4
POLL_S = 0.2


@dataclasses.dataclass
class Clock:
    """Seconds spent in calls that are watched; one that a watched call makes counts once."""

    seconds: float = 0.0
    depth: int = 0

    def watched(self, owner: type, name: str) -> Any:
        """A patch under which calls of owner.name are watched."""
        real: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **named: Any) -> Any:
            self.depth += 1
            began = time.perf_counter()
            try:
                return real(*args, **named)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += time.perf_counter() - began

        return mock.patch.object(owner, name, timed)


def share_of_steps(folder: Path) -> float:
    """Of the wall time of a run's steps, what goes into keeping the run."""
    config = TrainingConfig.preset("debug", max_steps=N_STEPS, eval_every=N_STEPS, sample_tokens=0)
    keeping, evaluating, all_steps = Clock(), Clock(), Clock()
    with contextlib.ExitStack() as patches:
        for owner, name in [
            (Trainer, "_checkpoint_if_due"),
            (Trainer, "_log_if_due"),
            (Trainer, "_go_on_saving"),
            (Ledger, "update"),
            (SpikeGuard, "finds"),
            (SpikeGuard, "remember"),
        ]:
            patches.enter_context(keeping.watched(owner, name))
        patches.enter_context(evaluating.watched(Trainer, "_evaluate_if_due"))
        patches.enter_context(evaluating.watched(Trainer, "_compile_if_due"))
        patches.enter_context(all_steps.watched(Trainer, "_take_steps"))
        Trainer(config, folder / "debug").train()
    steps_s = all_steps.seconds - evaluating.seconds
    print(
        f"debug, {N_STEPS} steps of {1000 * steps_s / N_STEPS:.1f} ms, a checkpoint every {config.checkpoint_every}, a "
        f"line of metrics every {config.log_every}: {1000 * keeping.seconds:.0f} of {1000 * steps_s:.0f} ms"
    )
    return keeping.seconds / steps_s


@contextlib.contextmanager
def running(run_dir: Path, checkpoint_every: int, *, in_background: bool) -> Iterator["subprocess.Popen[bytes]"]:
    """A trainer on a run with the state of the 100M preset."""
    config = TrainingConfig.preset(
        "100M",
        batch_size=2,
        micro_batch_size=2,
        log_every=1,
        checkpoint_every=checkpoint_every,
        keep_checkpoints=1,
        checkpoints_in_background=in_background,
    )
    run_dir.mkdir()
    (run_dir / paths.CONFIG).write_text(config.to_json())
    with (run_dir / paths.LOG).open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "scripts.trainer", str(run_dir)], cwd=ROOT, stderr=log)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def added_by_checkpoint(run_dir: Path, n_cycles: int, n_steps: int, *, in_background: bool) -> dict[str, float]:
    """Seconds that a checkpoint adds to the time until the next step is done, and what that is compared with."""
    last_step = n_steps * (n_cycles + 1) + 1
    with running(run_dir, n_steps, in_background=in_background) as process:
        while process.poll() is None:
            records = read_records(run_dir / paths.METRICS) if (run_dir / paths.METRICS).is_file() else []
            if records and records[-1]["step"] >= last_step:
                break
            time.sleep(POLL_S)
    ends = {record["step"]: record["elapsed_s"] for record in records}
    if last_step not in ends:
        raise RuntimeError(f"a run must come to step {last_step}, but ended before; see {run_dir / paths.LOG}")
    took = {step: ends[step] - ends[step - 1] for step in ends if step - 1 in ends}
    added, together, usual = [], [], []
    for first in range(n_steps + 1, last_step, n_steps):  # the cycle before has the compiler in it
        cycle = [took[step] for step in range(first, first + n_steps)]
        usual.append(statistics.median(cycle[-LAST:]))
        added.append(cycle[0] - usual[-1])
        together.append(sum(cycle) - n_steps * usual[-1])
    plan = read_plan(run_dir)
    assert plan is not None
    return {
        "usual": statistics.median(usual),
        "added": statistics.median(added),
        "most": max(added),
        "together": statistics.median(together),
        "bytes": plan.checkpoint_bytes,
        "planned": plan.prediction.checkpoint_copies,
    }


def main() -> int:
    """Measure and print; returns 1 where a goal is missed."""
    wait_until_quiet()
    print(describe())
    with tempfile.TemporaryDirectory() as name:
        share = share_of_steps(Path(name))
        print(f"share of the steps' time: {100 * share:.2f} % (goal below 1 %: {_verdict(share < MAX_SHARE)})\n")
        print("| checkpoint | MB | copies planned, MB | step, ms | added, ms | at most, ms | to all steps, ms |")
        print("|---|---|---|---|---|---|---|")
        for kind, cycles in {"at once": AT_ONCE, "in the background": IN_BACKGROUND}.items():
            in_background = cycles is IN_BACKGROUND
            found = added_by_checkpoint(Path(name, kind.replace(" ", "-")), *cycles, in_background=in_background)
            milliseconds = (f"{1000 * found[key]:,.0f}" for key in ("usual", "added", "most", "together"))
            megabytes = (f"{found[key] / 1e6:,.0f}" for key in ("bytes", "planned"))
            print(f"| {kind} |", " | ".join([*megabytes, *milliseconds]), "|", flush=True)
    is_small = found["added"] <= MAX_ADDED_S
    print(f"\nin the background, goal at most {1000 * MAX_ADDED_S:.0f} ms: {_verdict(is_small)}")
    return int(not (is_small and share < MAX_SHARE))


def _verdict(holds: bool) -> str:
    return "holds" if holds else "MISSED"


if __name__ == "__main__":
    sys.exit(main())

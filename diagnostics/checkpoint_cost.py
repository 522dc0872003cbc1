"""What does it cost a run that nothing of it is lost? In a quiet machine's wall time:

    python -m diagnostics.checkpoint_cost

First a whole run of the `debug` preset with its default intervals: the share of its steps' time, without evaluation,
that goes into checkpoints, metrics, ledger, the search for what is not finite, and the guard. Then a model of the
`100M` preset with its optimizer, on few tokens so that its steps are short: what a checkpoint and the step after it
take beyond a usual step, when it is written at once and in the background. There it is written by and by after many
steps; how long that takes is told too.
"""

import contextlib
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from diagnostics.bench.machine import describe, wait_until_quiet
from hydra.runtime.guard import SpikeGuard
from hydra.runtime.ledger import Ledger
from scripts.config import TrainingConfig
from scripts.trainer import BACKGROUND_SHARE, Trainer

MAX_SHARE = 0.01
MAX_ADDED_S = 0.150
N_ROUNDS, N_USUAL = 8, 4
WARM = 6
"""Steps after which all is compiled and the processor has found its pace."""


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
    config = TrainingConfig.preset("debug")
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
    n_steps, steps_s = config.max_steps, all_steps.seconds - evaluating.seconds
    print(
        f"debug, {n_steps} steps of {1000 * steps_s / n_steps:.1f} ms, a checkpoint every {config.checkpoint_every}, "
        f"an evaluation every {config.eval_every}, a line of metrics every {config.log_every}: "
        f"{1000 * keeping.seconds:.0f} of {1000 * steps_s:.0f} ms"
    )
    return keeping.seconds / steps_s


def added_by_checkpoint(run_dir: Path, *, in_background: bool) -> dict[str, float]:
    """Seconds that a checkpoint and the step after it take beyond a usual step, and what there is to know beside."""
    config = TrainingConfig.preset(
        "100M", batch_size=2, micro_batch_size=2, checkpoint_every=1, checkpoints_in_background=in_background
    )
    usual, added, rest = [], [], []
    with Trainer(config, run_dir).at_step(WARM) as trainer:
        trainer._go_on_saving(0.0)  # takes the memory
        for _ in range(N_ROUNDS):
            usual.append(statistics.median(_seconds(trainer.take_step) for _ in range(N_USUAL)))
            began = time.perf_counter()
            trainer._checkpoint_if_due()
            step_s = _seconds(trainer.take_step)
            trainer._go_on_saving(BACKGROUND_SHARE * step_s)
            added.append(time.perf_counter() - began - usual[-1])
            if trainer.background:
                rest.append(_seconds(trainer.background.finish))
        plan = trainer.plan
    return {
        "usual": statistics.median(usual),
        "added": statistics.median(added),
        "most": max(added),
        "rest": statistics.median(rest) if rest else 0.0,
        "bytes": plan.checkpoint_bytes,
        "planned": plan.prediction.checkpoint_copies,
    }


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> int:
    """Measure and print; returns 1 where a goal is missed."""
    wait_until_quiet()
    print(describe())
    with tempfile.TemporaryDirectory() as name:
        share = share_of_steps(Path(name))
        print(f"share of the steps' time: {100 * share:.2f} % (goal below 1 %: {_verdict(share < MAX_SHARE)})\n")
        print("| checkpoint | MB | copies planned, MB | step, ms | added, ms | at most, ms | written by and by, ms |")
        print("|---|---|---|---|---|---|---|")
        for kind, in_background in {"at once": False, "in the background": True}.items():
            found = added_by_checkpoint(Path(name, kind.replace(" ", "-")), in_background=in_background)
            milliseconds = (f"{1000 * found[key]:,.0f}" for key in ("usual", "added", "most", "rest"))
            megabytes = (f"{found[key] / 1e6:,.0f}" for key in ("bytes", "planned"))
            print(f"| {kind} |", " | ".join([*megabytes, *milliseconds]), "|", flush=True)
    is_small = found["added"] <= MAX_ADDED_S
    print(f"\nin the background, goal at most {1000 * MAX_ADDED_S:.0f} ms: {_verdict(is_small)}")
    return int(not (is_small and share < MAX_SHARE))


def _verdict(holds: bool) -> str:
    return "holds" if holds else "MISSED"


if __name__ == "__main__":
    sys.exit(main())

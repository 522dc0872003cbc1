"""What the progress of a run is told to be, in one line."""

import time

import pytest

from hydra.notebook.progress import describe
from hydra.runtime import RunStatus
from hydra.runtime.processes import current_process

RECORD = {"loss_nats": 1.25, "tokens_per_s": 2000.0, "step_ms": 500.0}


@pytest.mark.parametrize(
    ("stage", "step", "line"),
    [
        ("training", 10, "step 10/20 | loss 1.2500 | 2,000 tokens/s | 5 s left"),
        ("evaluating", 10, "step 10/20 | evaluating | loss 1.2500 | 2,000 tokens/s | 5 s left"),
        ("evaluating", 20, "step 20/20 | evaluating | loss 1.2500 | 2,000 tokens/s"),
        ("training", 20, "step 20/20 | loss 1.2500 | 2,000 tokens/s"),
    ],
)
def test_what_a_run_at_work_is_doing(stage: str, step: int, line: str) -> None:
    status = RunStatus(
        status="running",
        stage=stage,
        step=step,
        max_steps=20,
        owner=current_process(),
        heartbeat_at=time.time(),
    )
    assert describe(status, RECORD) == line

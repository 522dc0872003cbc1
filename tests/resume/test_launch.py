"""Starting the trainer as a process of its own."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hydra.errors import RunCutOffError, RunError
from scripts import launch as module
from scripts.config import TrainingConfig


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("import os; os.kill(os.getpid(), 9)", RunCutOffError),
        ("raise SystemExit(75)", RunCutOffError),
        ("raise SystemExit('no such thing')", RunError),
    ],
)
def test_a_trainer_that_ends_before_it_owns_the_run(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, program: str, error: type[RunError]
) -> None:
    run_dir = make_run("ended")
    real = module.start_process
    monkeypatch.setattr(
        module, "start_process", lambda command, **options: real([sys.executable, "-c", program], **options)
    )
    with pytest.raises(RunError) as caught:
        module.launch(TrainingConfig.from_json((run_dir / "config.json").read_text()), run_dir)
    assert type(caught.value) is error

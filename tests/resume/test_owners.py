"""A run directory has one owner, and says so to any other; what it cannot write in, it names."""

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hydra.runtime import Run
from hydra.testing import storm

MakeRun = Callable[..., Path]
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1


def test_of_two_trainers_one_wins_and_the_other_says_why(make_run: MakeRun) -> None:
    run_dir = make_run("owned", max_steps=100_000, warmup_steps=0)
    both = [storm.start_trainer(run_dir), storm.start_trainer(run_dir)]
    while Run.open(run_dir).status().pid is None:
        assert any(process.poll() is None for process in both)
        time.sleep(0.01)
    owned_at = time.monotonic()
    owner = Run.open(run_dir).status().pid
    winner, loser = sorted(both, key=lambda process: process.pid != owner)
    assert winner.pid == owner
    _, errors = loser.communicate(timeout=60)
    assert time.monotonic() - owned_at < 5
    assert loser.returncode == 1
    # It may look between the winner's lock and its first word.
    assert f"owned by process {winner.pid};" in errors or "owned by process (starting);" in errors
    assert "Traceback" not in errors
    assert "owned by" not in (run_dir / "trainer.log").read_text()
    storm.wait_until(winner, run_dir, storm.AT_WORK)
    storm.kill_group(winner)
    winner.communicate()

    assert (run_dir / "lock").exists()
    heir = storm.start_trainer(run_dir)
    storm.wait_until(heir, run_dir, storm.AT_WORK)
    assert Run.open(run_dir).status().pid == heir.pid
    storm.kill_group(heir)
    heir.communicate()


def without_privileges() -> None:
    """Root may write anywhere; what it starts next may not."""
    if os.geteuid() == 0:
        assert ctypes.CDLL(None, use_errno=True).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0) == 0


def test_a_directory_that_is_read_only_is_named(make_run: MakeRun) -> None:
    run_dir = make_run("read_only")
    run_dir.chmod(0o555)
    try:
        done = subprocess.run(
            [sys.executable, "-m", storm.TRAINER, str(run_dir)],
            cwd=storm.ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            preexec_fn=without_privileges,
        )
        assert done.returncode == 1
        assert f"{run_dir}" in done.stderr
        assert "must be writable" in done.stderr
        assert "Traceback" not in done.stderr
        assert {path.name for path in run_dir.iterdir()} == {"config.json"}
    finally:
        run_dir.chmod(0o755)
    storm.finish(run_dir)

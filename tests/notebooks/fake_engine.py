"""`python fake_engine.py IN OUT --engine fake ...`: papermill's command, our engine bound to a tiny plan.

`python fake_engine.py --trainer RUN_DIR N_STEPS` is the trainer of that plan: a step takes 0.05 s, SIGTERM ends it.
"""

import signal
import sys
import time
from pathlib import Path


def start_trainer(run_dir: Path, n_steps: int, *, dies_with_caller: bool = True) -> None:
    """What `scripts.trainer.launch` does in a batch run: start the trainer and return once it owns the run."""
    from hydra.runtime.processes import start_process

    process = start_process(
        [sys.executable, __file__, "--trainer", str(run_dir), str(n_steps)],
        working_dir=run_dir,
        log=run_dir / "trainer.log",
        dies_with_caller=dies_with_caller,
    )
    deadline = time.monotonic() + 60
    while not (run_dir / "state.json").exists():
        assert process.poll() is None, (run_dir / "trainer.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def train(run_dir: Path, n_steps: int) -> int:
    from hydra.runtime.ledger import Ledger
    from hydra.runtime.records import append_record

    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    ledger = Ledger.open(run_dir)
    ledger.begin(n_steps)
    for step in range(ledger.state.step + 1, n_steps + 1):
        time.sleep(0.05)
        row = {"step": step, "loss_nats": 5.0 / step, "tokens_per_s": 100.0, "step_ms": 50.0}
        append_record(run_dir / "metrics.jsonl", row)
        ledger.update(step=step, stage="training")
        if stopped:
            ledger.finish("interrupted", stage="interrupted", cause="SIGTERM", message="told to end")
            return 75
    append_record(run_dir / "metrics.jsonl", {"step": n_steps, "val_bits_per_byte": 1.5, "val_loss_nats": 2.5})
    ledger.update(val_bits_per_byte=1.5, val_loss_nats=2.5)
    ledger.finish("done", stage="done")
    return 0


def papermill_command() -> None:
    from papermill.cli import papermill
    from papermill.engines import papermill_engines

    from hydra.errors import ConfigError
    from hydra.notebook.doors import guard_paths
    from hydra.notebook.engine import NotebookEngine, silence_unknown_parameters
    from hydra.notebook.plan import Plan, Request

    class FakeEngine(NotebookEngine):
        engine_name = "fake"

        @classmethod
        def plan(cls, request: Request) -> Plan:
            unknown = set(request.parameters) - {"n_steps", "text"}
            if unknown:
                raise ConfigError(f"{unknown.pop()}: there is no such parameter")
            return Plan(
                run_dir=request.run_dir,
                notebook_name=request.notebook_name,
                question="Does the engine tell the truth?",
                command=request.command("fake", [], request.run_dir),
                config={"n_steps": 1},
                differences={},
            )

    papermill_engines.register("fake", FakeEngine)
    silence_unknown_parameters("fake")
    guard_paths("fake")
    papermill()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trainer"]:
        sys.exit(train(Path(sys.argv[2]), int(sys.argv[3])))
    papermill_command()

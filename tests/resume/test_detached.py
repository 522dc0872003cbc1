"""Started from JupyterLab a run belongs to nobody: its kernel may die, and another notebook attaches to it."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jupyter_client.manager import KernelManager, start_new_kernel

from hydra.runtime import Run

ROOT = Path(__file__).parents[2]


@contextmanager
def lab_kernel(notebook: Path) -> Iterator[tuple[KernelManager, object]]:
    """A kernel as Jupyter Server starts one: it knows the notebook's path and works in its folder."""
    environment = {**os.environ, "JPY_SESSION_NAME": str(notebook)}
    manager, client = start_new_kernel(kernel_name="python3", env=environment, cwd=str(ROOT / "notebooks"))
    try:
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def execute(client: object, source: str) -> str:
    """Run one cell; its printed text, or an AssertionError with its traceback."""
    printed: list[str] = []

    def collect(message: dict) -> None:
        if message["msg_type"] == "stream":
            printed.append(message["content"]["text"])

    reply = client.execute_interactive(source, timeout=90, output_hook=collect)  # type: ignore[attr-defined]
    assert reply["content"]["status"] == "ok", "\n".join(reply["content"]["traceback"])
    return "".join(printed)


def test_the_run_outlives_its_kernel_and_a_second_one_attaches(tmp_path: Path, corpus_dir: Path) -> None:
    parameters = (
        "# Parameters: as in the notebook\n"
        'preset = "tiny"\n'
        "max_steps = 1_000_000\n"
        "threads = 1\n"
        f"corpus = {str(corpus_dir)!r}\n"
        f"data_dir = {str(tmp_path / 'data')!r}\n"
        f"run_dir = {str(tmp_path / 'runs' / 'explored')!r}\n"
    )
    start = (
        "from hydra.notebook import read_parameters, run_directory\n"
        "from scripts.config import TrainingConfig\n"
        "from scripts.trainer import launch\n"
        "run = launch(TrainingConfig.from_parameters(read_parameters()), run_directory())\n"
        "print(run.status().pid)"
    )
    with lab_kernel(tmp_path / "explored.ipynb") as (manager, client):
        execute(client, parameters)
        pid = int(execute(client, start))
        os.kill(manager.provisioner.pid, signal.SIGKILL)  # type: ignore[union-attr]
    run = Run.open(tmp_path / "runs" / "explored")
    step = run.status().step
    deadline = time.monotonic() + 20
    while run.status().step < step + 20:
        assert run.status().is_alive
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with lab_kernel(tmp_path / "explored.ipynb") as (_, client):
        execute(client, parameters)
        assert int(execute(client, start)) == pid
        assert "interrupted" in execute(client, "print(run.stop().status)")
    assert run.status().cause == "SIGTERM"

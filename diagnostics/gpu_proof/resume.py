"""Whether a training run on the GPU that is killed goes on, and ends where it would have ended."""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from diagnostics.gpu_proof.text import as_table, say

ROOT = Path(__file__).parents[2]
NEEDED = ("numpy", "pydantic", "safetensors", "tokenizers", "tensorboard")
"""What the trainer imports, in a process of its own."""


def kill_and_resume() -> str:
    """A run on the GPU that is killed (SIGKILL) in the middle and resumed ends with the same weights."""
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(name=package)
    from scripts.config import TrainingConfig

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        hashes = {}
        for name in ("whole", "killed"):
            run_dir = Path(folder) / name
            run_dir.mkdir()
            config = TrainingConfig.preset(
                "tiny",
                corpus=str(ROOT / "tests" / "assets" / "notes"),
                data_dir=str(Path(folder) / "data"),
                device="cuda",
                dtype="bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32",
                kernels="triton",
                max_steps=60,
                sample_tokens=0,
                log_every=10,
            )
            (run_dir / "config.json").write_text(config.to_json())
            killed_at = _run_trainer(run_dir, kill_at_step=31 if name == "killed" else None)
            if name == "killed":
                say(f"killed after step {killed_at}")
                _run_trainer(run_dir, kill_at_step=None)
            state = json.loads((run_dir / "state.json").read_text())
            weights = max((run_dir / "checkpoints").glob("step-*")) / "model.safetensors"
            hashes[name] = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
            figures = (state["status"], state["step"], state["restarts"], f"{state['val_loss_nats']:.4f}", hashes[name])
            rows.append((name, "" if killed_at is None else killed_at, *figures))
            say(str(rows[-1]))
    verdict = "ok: the same weights" if hashes["whole"] == hashes["killed"] else "**FAILED: other weights**"
    heads = ("run", "killed after step", "status", "step", "restarts", "val_loss_nats", "SHA-256 of the weights")
    return f"{verdict}\n\n" + as_table(heads, rows)


def _run_trainer(run_dir: Path, kill_at_step: int | None) -> int | None:
    """Train to the end, or kill the process when that step is done; returns the step it was killed after."""
    log = run_dir / "trainer.log"
    with log.open("a") as file:
        command = [sys.executable, "-m", "scripts.trainer", str(run_dir)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + 60
    state = run_dir / "state.json"
    while process.poll() is None:
        step = json.loads(state.read_text()).get("step", 0) if kill_at_step is not None and state.exists() else 0
        if kill_at_step is not None and step >= kill_at_step:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return step
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError(f"the trainer took more than 60 s: {log.read_text()[-1500:]}")
        time.sleep(0.005)
    if process.returncode != 0 or kill_at_step is not None:
        raise RuntimeError(f"the trainer ended with status {process.returncode}: {log.read_text()[-1500:]}")
    return None

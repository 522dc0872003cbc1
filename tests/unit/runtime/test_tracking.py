"""A copy of the metrics that cannot be written, or a service that hangs, reaches neither the run nor its records."""

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hydra.errors import ConfigError
from hydra.runtime import paths
from hydra.runtime.ledger import Ledger
from hydra.runtime.records import MetricsWriter, read_records
from hydra.runtime.tracking import FLUSH_S, LEAVE_S, check_installed
from scripts.config import ADDED_LATER, TrainingConfig
from scripts.launch import launch
from scripts.trainer import Trainer

ROOT = Path(__file__).parents[3]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    (tmp_path / "trainer.log").touch()
    ledger = Ledger.open(tmp_path)
    ledger.begin(max_steps=10)
    yield ledger
    ledger.close()


def test_a_hung_process_holds_up_nothing(tmp_path: Path, ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(tmp_path, 0, "offline", "project")
    pid = writer._tracker._process.pid  # type: ignore[union-attr]
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        for step in range(1, 10_001):
            writer.write({"step": step, "loss_nats": 1.0 / step})
        assert time.monotonic() - began < 60  # 3 s; ten thousand waits would take hours
        ledger.finish("done", stage="done")
        began = time.monotonic()
        writer.close()
        assert time.monotonic() - began < FLUSH_S + LEAVE_S + 1
    finally:
        if Path("/proc", str(pid)).exists():
            os.kill(pid, signal.SIGKILL)
    assert len(read_records(tmp_path / paths.METRICS)) == 10_000
    assert "to send what is missing: python -m hydra.runtime.send_to_wandb" in caplog.text
    assert not Path("/proc", str(pid)).exists()


def test_a_dead_process_is_told_of_at_the_end(tmp_path: Path, ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(tmp_path, 0, "offline", "project")
    writer._tracker._process.kill()  # type: ignore[union-attr]
    writer.write({"step": 1, "loss_nats": 2.5})
    ledger.finish("done", stage="done")
    writer.close()
    assert "status -9" in caplog.text
    assert read_records(tmp_path / paths.METRICS) == [{"step": 1, "loss_nats": 2.5}]


def test_no_place_for_tensorboard_is_no_reason_to_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / paths.EVENTS).write_text("a file where a folder must be")
    with MetricsWriter(tmp_path, 0, "disabled", "-") as writer:
        writer.write({"step": 1, "loss_nats": 2.5})
        writer.sync()
    assert read_records(tmp_path / paths.METRICS) == [{"step": 1, "loss_nats": 2.5}]
    assert caplog.text.count("TensorBoard's copy of the metrics ends here") == 1


def test_a_full_disk_under_tensorboard_is_no_reason_to_stop(tmp_path: Path) -> None:
    """Its events are larger than the lines of metrics.jsonl, so that a limit of file sizes meets them first."""
    n_records, limit = 300, 32 * 1024
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from hydra.runtime.records import MetricsWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "with MetricsWriter(Path(sys.argv[1]), 0, 'disabled', '-') as writer:\n"
        f"    for step in range(1, {n_records + 1}):\n"
        "        writer.write({'step': step, 'a': 1, 'b': 2, 'c': 3, 'd': 4})\n"
        "        writer.sync()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(read_records(tmp_path / paths.METRICS)) == n_records
    (events,) = (tmp_path / paths.EVENTS).iterdir()
    assert events.stat().st_size <= limit
    assert done.stderr.count("TensorBoard's copy of the metrics ends here") == 1
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_missing_package_is_told_before_the_run_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    check_installed("disabled")
    for mode in ("offline", "online"):
        config = TrainingConfig.preset("tiny", wandb_mode=mode)
        with pytest.raises(ConfigError, match=r"wandb_mode '\w+' needs the package wandb.*requirements\.lock"):
            launch(config, tmp_path / mode)
        assert not (tmp_path / mode).exists()
        (tmp_path / mode).mkdir()
        (tmp_path / mode / paths.CONFIG).write_text(config.to_json())
        with pytest.raises(ConfigError, match="needs the package wandb"):
            Trainer(config, tmp_path / mode).train()
        assert [entry.name for entry in (tmp_path / mode).iterdir()] == [paths.CONFIG]


def test_runs_of_before_have_no_copy_at_wandb() -> None:
    stored = json.loads(TrainingConfig().to_json())
    del stored["wandb_mode"], stored["wandb_project"]
    assert TrainingConfig.from_json(json.dumps(stored)).wandb_mode == "disabled"
    assert ADDED_LATER["wandb_mode"] == "disabled"


@pytest.mark.parametrize("fields", [{"wandb_mode": "on"}, {"wandb_mode": None}, {"wandb_project": ""}])
def test_what_wandb_cannot_be_asked_for(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        TrainingConfig.preset("tiny", **fields)


def test_the_trainer_never_imports_wandb() -> None:
    code = (
        "import sys\n"
        "import scripts.trainer, scripts.launch, scripts.compare, hydra.notebook, hydra.runtime.send_to_wandb\n"
        "from torch.utils.tensorboard import SummaryWriter\n"
        "assert 'wandb' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

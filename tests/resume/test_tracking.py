"""W&B gets each record once, whatever is killed; whether it answers changes neither a run's end nor its weights."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from hydra.runtime import Run
from hydra.runtime.tracking import FLUSH_S, LEAVE_S

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
from wandb_server import WandbServer  # noqa: E402

sys.path.remove(str(HERE))

MakeRun = Callable[..., Path]
StartTrainer = Callable[[Path], "subprocess.Popen[str]"]
MEASURED = ("tokens_per_s", "step_ms", "peak_mem_mib", "elapsed_s")
FIELDS: dict[str, Any] = {"max_steps": 300, "checkpoint_every": 7, "eval_every": 50, "log_every": 3}


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no settings and no server of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def untracked(make_run: MakeRun, start_trainer: StartTrainer) -> Path:
    run_dir = make_run("untracked", **FIELDS)
    finish(start_trainer(run_dir))
    assert not (run_dir / "wandb").exists()
    return run_dir


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    server = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    yield server
    server.close()


def finish(process: "subprocess.Popen[str]", status: int = 0) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors


def wait_until(holds: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def commands() -> dict[int, list[str]]:
    """The command line of every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().decode().split("\0")
    return found


def pids_of(run_dir: Path) -> list[int]:
    """The trainer of a run, the process that follows it, and W&B's own, whose command line names the second."""
    running = commands()
    ours = {pid for pid, command in running.items() if str(run_dir) in command}
    return [pid for pid, command in running.items() if pid in ours or {str(pid) for pid in ours} & set(command)]


def is_none_left(pids: list[int]) -> bool:
    """A process that has ended and is not waited for has no command line."""
    running = commands()
    return not any(running.get(pid, [""])[0] for pid in pids)


def records_of_file(path: Path) -> Iterator[Record]:
    """What a .wandb file holds: records of protobuf in LevelDB's log format (7 bytes of header, blocks of 32 KiB)."""
    content, place, parts = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def offline_history(run_dir: Path) -> list[dict[str, Any]]:
    rows = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for record in records_of_file(path):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return rows


def as_trained(records: list[dict[str, Any]], *left_out: str) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if not key.startswith("_") and key not in left_out}
        for record in records
    ]


def test_offline_files_hold_the_metrics_and_nothing_that_was_not_given(
    make_run: MakeRun,
    start_trainer: StartTrainer,
    untracked: Path,
    weights_hash: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CANARY", "canary-of-the-environment")
    run_dir = make_run("offline", **FIELDS, wandb_mode="offline", wandb_project="a project")
    finish(start_trainer(run_dir))
    assert as_trained(offline_history(run_dir)) == Run.open(run_dir).metrics()
    assert weights_hash(run_dir) == weights_hash(untracked)
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    content = path.read_bytes()
    assert b"a project" in content
    assert b"val_bits_per_byte" in content
    found = (
        socket.gethostname(),
        "canary-of-the-environment",
        "scripts.trainer",
        "send_to_wandb",
        "diff --git",
        "a" * 40,
    )
    assert not [word for word in found if word.encode() in content]
    files = {entry.name for entry in (path.parent / "files").rglob("*") if entry.is_file()}
    assert files <= {"config.yaml", "wandb-summary.json"}

    # Killed between the two records of the last step, the second is what is missing.
    tracked = run_dir / "wandb" / "tracked.json"
    tracked.write_text(json.dumps({**json.loads(tracked.read_text()), "sent": [300, 1]}))
    path.unlink()
    command = [sys.executable, "-m", "hydra.runtime.send_to_wandb", str(run_dir), "offline", "a project"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    assert as_trained(offline_history(run_dir)) == Run.open(run_dir).metrics()[-1:]


def test_killed_runs_hand_each_record_over_once_and_leave_no_process(
    make_run: MakeRun, start_trainer: StartTrainer
) -> None:
    run_dir = make_run("killed", **{**FIELDS, "max_steps": 1200}, wandb_mode="offline")
    for _ in range(3):
        n_before = len(Run.open(run_dir).metrics())
        process = start_trainer(run_dir)
        wait_until(lambda n=n_before: len(Run.open(run_dir).metrics()) > n + 8 and len(pids_of(run_dir)) == 3)
        pids = pids_of(run_dir)
        process.kill()
        process.wait()
        wait_until(lambda pids=pids: is_none_left(pids), FLUSH_S + 5)
    finish(start_trainer(run_dir))
    assert not pids_of(run_dir)
    assert len(list(run_dir.glob("wandb/offline-run-*"))) == 4
    rows = as_trained(offline_history(run_dir), *MEASURED)
    assert rows == as_trained(Run.open(run_dir).metrics(), *MEASURED)


@pytest.mark.parametrize("answer", ["refused", "none"])
def test_an_unreachable_server_changes_neither_end_nor_weights(
    answer: str,
    make_run: MakeRun,
    start_trainer: StartTrainer,
    untracked: Path,
    weights_hash: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        port = silent.getsockname()[1] if answer == "none" else 9
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        run_dir = make_run("unreachable", **FIELDS, wandb_mode="online", wandb_project="p q")
        finish(start_trainer(run_dir))
        assert not any(
            "send_to_wandb" in " ".join(command) for command in commands().values() if str(run_dir) in command
        )
    status = Run.open(run_dir).status()
    assert status.status == "done"
    assert weights_hash(run_dir) == weights_hash(untracked)
    log = (run_dir / "trainer.log").read_text()
    assert log.count("to send what is missing: ") == 1
    assert f"python -m hydra.runtime.send_to_wandb {run_dir} online 'p q'" in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ended_from_outside_with_a_server_that_does_not_answer(
    number: signal.Signals, make_run: MakeRun, start_trainer: StartTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        run_dir = make_run("ended", **{**FIELDS, "max_steps": 100_000}, wandb_mode="online")
        process = start_trainer(run_dir)
        wait_until(lambda: Run.open(run_dir).status().step > 10 and len(pids_of(run_dir)) == 3)
        pids = pids_of(run_dir)
        began = time.monotonic()
        process.send_signal(number)
        if number == signal.SIGTERM:
            # The checkpoint comes first, and the ledger: W&B gets what time there is.
            wait_until(lambda: Run.open(run_dir).status().status == "interrupted", FLUSH_S - 1)
            step = Run.open(run_dir).status().step
            assert (run_dir / "checkpoints" / f"step-{step:08}").is_dir()
            finish(process, os.EX_TEMPFAIL)
        else:
            process.wait()
        wait_until(lambda: is_none_left(pids))
        assert time.monotonic() - began < FLUSH_S + LEAVE_S + 5


def test_nothing_is_missing_when_all_is_killed_at_once(make_run: MakeRun, start_trainer: StartTrainer) -> None:
    """What W&B's program had not written to its file is handed over again."""
    run_dir = make_run("all-killed", **{**FIELDS, "max_steps": 900}, wandb_mode="offline")
    tracked = run_dir / "wandb" / "tracked.json"
    for kill in range(2):
        process = start_trainer(run_dir)
        n_files = kill + 1
        wait_until(lambda n=n_files: len(list(run_dir.glob("wandb/offline-run-*"))) == n)
        n_before = json.loads(tracked.read_text())["sent"][0]
        wait_until(lambda n=n_before: json.loads(tracked.read_text())["sent"][0] > n)
        for pid in pids_of(run_dir):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    finish(start_trainer(run_dir))
    rows = as_trained(offline_history(run_dir), *MEASURED)
    unique = [row for i, row in enumerate(rows) if row not in rows[:i]]
    unique.sort(key=lambda row: (row["step"], "val_loss_nats" in row))
    assert unique == as_trained(Run.open(run_dir).metrics(), *MEASURED)


def test_a_server_that_falls_silent_gets_the_rest_later(
    make_run: MakeRun, start_trainer: StartTrainer, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "0.1")  # W&B's own is 15 s
    run_dir = make_run("outage", **{**FIELDS, "max_steps": 100_000}, wandb_mode="online")
    process = start_trainer(run_dir)
    wait_until(lambda: server.history)
    server.is_silent = True
    n_before = len(Run.open(run_dir).metrics())
    wait_until(lambda: len(Run.open(run_dir).metrics()) > n_before + 20)
    process.send_signal(signal.SIGTERM)
    finish(process, os.EX_TEMPFAIL)
    assert 0 < len(server.history) < len(Run.open(run_dir).metrics())
    assert "to send what is missing" in (run_dir / "trainer.log").read_text()

    server.is_silent = False
    command = [sys.executable, "-m", "hydra.runtime.send_to_wandb", str(run_dir), "online", "hydra"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    assert as_trained(server.history) == Run.open(run_dir).metrics()
    assert server.exit_code == 1


def test_online_sessions_go_on_in_the_same_run(
    make_run: MakeRun, start_trainer: StartTrainer, server: WandbServer
) -> None:
    run_dir = make_run("online", **FIELDS, wandb_mode="online")
    process = start_trainer(run_dir)
    wait_until(lambda: len(Run.open(run_dir).metrics()) > 20)
    process.kill()
    process.wait()
    finish(start_trainer(run_dir))
    rows = as_trained(server.history, *MEASURED)
    assert rows == as_trained(Run.open(run_dir).metrics(), *MEASURED)
    everything = b"\n".join(server.received)
    assert b"val_bits_per_byte" in everything
    for word in (socket.gethostname(), "scripts.trainer", "send_to_wandb", "diff --git"):
        assert word.encode() not in everything, word
    assert everything.count(json.loads((run_dir / "wandb" / "tracked.json").read_text())["id"].encode()) > 1


def test_without_an_account_the_log_says_so(
    make_run: MakeRun, start_trainer: StartTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    run_dir = make_run("no-account", wandb_mode="online")
    finish(start_trainer(run_dir))
    log = (run_dir / "trainer.log").read_text()
    assert "wandb login" in log
    assert "Traceback" not in log

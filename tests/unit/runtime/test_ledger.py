"""The ledger tells the truth whoever reads it, and a run has one owner."""

import errno
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hydra.errors import RunError
from hydra.runtime import Run, paths
from hydra.runtime import ledger as ledger_module
from hydra.runtime.ledger import Ledger, RunStatus, read_status
from hydra.runtime.processes import ProcessIdentity, current_process

OWN_AND_WAIT = """
import sys, time
from pathlib import Path
from hydra.runtime.ledger import Ledger
ledger = Ledger.open(Path(sys.argv[1]))
ledger.begin(max_steps=10)
ledger.update(stage="training", step=3)
print("owned", flush=True)
time.sleep(60)
"""


def start_owner(run_dir: Path) -> "subprocess.Popen[str]":
    owner = subprocess.Popen([sys.executable, "-c", OWN_AND_WAIT, str(run_dir)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "owned\n"
    return owner


def test_a_run_without_a_ledger_is_new(tmp_path: Path) -> None:
    assert read_status(tmp_path).status == "queued"


def test_second_owner_is_refused_and_named_and_a_killed_owner_frees_the_run(tmp_path: Path) -> None:
    owner = start_owner(tmp_path)
    try:
        with pytest.raises(RunError, match=f"one owner.*process {owner.pid}"):
            Ledger.open(tmp_path)
        assert read_status(tmp_path).status == "running"
    finally:
        owner.kill()
    # Not yet reaped: a zombie must not pass for an owner at work.
    deadline = time.monotonic() + 5
    while read_status(tmp_path).is_alive:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (read_status(tmp_path).status, read_status(tmp_path).cause) == ("interrupted", "killed")
    owner.wait()
    ledger = Ledger.open(tmp_path)
    ledger.begin(max_steps=10)
    assert (ledger.state.restarts, ledger.state.step, ledger.state.status) == (1, 3, "running")
    ledger.close()


def test_a_reused_pid_is_not_the_owner(tmp_path: Path) -> None:
    me = current_process()
    for imposter in (replace(me, start_ticks=me.start_ticks - 1), replace(me, boot_id="an earlier boot")):
        state = RunStatus(status="running", owner=imposter, heartbeat_at=time.time())
        paths.write_json(tmp_path / paths.STATE, asdict(state))
        assert read_status(tmp_path).status == "interrupted"


ELSEWHERE = {
    "another machine": {"boot_id": "another", "host": "another-machine"},
    "container": {"pid_namespace": "pid:[1]"},
}


@pytest.mark.parametrize("where", ELSEWHERE)
@pytest.mark.parametrize(("age_s", "expected"), [(5.0, "running"), (600.0, "interrupted")])
def test_an_owner_elsewhere_is_judged_by_its_heartbeat(tmp_path: Path, age_s: float, expected: str, where: str) -> None:
    owner: ProcessIdentity = replace(current_process(), **ELSEWHERE[where])
    state = RunStatus(status="running", owner=owner, heartbeat_at=time.time() - age_s)
    paths.write_json(tmp_path / paths.STATE, asdict(state))
    assert read_status(tmp_path).status == expected


def test_the_last_word_stands(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path)
    ledger.begin(max_steps=10)
    ledger.finish("interrupted", stage="stopped", cause="SIGTERM")
    ledger.update(stage="training", step=7)
    assert (read_status(tmp_path).status, read_status(tmp_path).step) == ("interrupted", 0)
    ledger.close()


def _write_for_ever(path: Path) -> None:
    number = 0
    while True:
        number += 1
        paths.write_json(path, {"number": number, "padding": "x" * 4000})


def test_a_reader_never_sees_half_a_file_even_when_the_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    for delay_s in (0.05, 0.11, 0.17, 0.23):
        writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(path,))
        writer.start()
        deadline = time.monotonic() + delay_s
        while time.monotonic() < deadline:
            if path.exists():
                assert len(json.loads(path.read_text())["padding"]) == 4000
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert len(json.loads(path.read_text())["padding"]) == 4000


def test_run_open_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"config\.json"):
        Run.open(tmp_path)


def test_stop_ends_the_owner(tmp_path: Path) -> None:
    (tmp_path / paths.CONFIG).write_text("{}")
    owner = start_owner(tmp_path)
    status = Run.open(tmp_path).stop(timeout_s=10)
    assert status.status == "interrupted"
    assert owner.wait() == -signal.SIGTERM


def test_what_a_killed_writer_left_is_cleared_and_a_living_one_s_is_not(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    abandoned, in_use = tmp_path / f".state.json.{dead.pid}.tmp", tmp_path / f".pretrain.ipynb.{os.getpid()}.tmp"
    for path in (abandoned, in_use, tmp_path / ".hidden.tmp"):
        path.write_text("half")
    ledger = Ledger.open(tmp_path)
    assert abandoned.exists()
    ledger.begin(max_steps=1)
    ledger.close()
    assert not abandoned.exists()
    assert in_use.exists()
    assert (tmp_path / ".hidden.tmp").exists()


class FullDisk:
    """While it is full, JSON can be written only in room that a file which is removed gives back."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run_dir, self.is_full = run_dir, False
        self._real = paths.write_json
        monkeypatch.setattr(paths, "write_json", self._write)

    def _write(self, path: Path, value: dict[str, object]) -> None:
        if self.is_full and any(self.run_dir.glob(".state.json.reserve.*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self._real(path, value)


def test_on_a_full_disk_the_last_word_takes_the_room_that_was_kept_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(tmp_path, monkeypatch)
    ledger = Ledger.open(tmp_path)
    ledger.begin(max_steps=10)
    (reserve,) = tmp_path.glob(".state.json.reserve.*")
    assert reserve.stat().st_blocks * 512 >= 2 * (tmp_path / paths.STATE).stat().st_size
    disk.is_full = True
    with pytest.raises(OSError, match=r"state\.json"):
        ledger.update(stage="training", step=3)
    ledger.finish("failed", stage="training", cause="disk full")
    ledger.close()
    assert (read_status(tmp_path).cause, read_status(tmp_path).step) == ("disk full", 3)
    assert list(tmp_path.glob(".*")) == []


def test_a_ledger_that_may_be_behind_catches_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FullDisk(tmp_path, monkeypatch)
    ledger = Ledger.open(tmp_path, waits_for_room=True)
    ledger.begin(max_steps=10)
    disk.is_full = True
    for step in range(3):
        ledger.update(stage=f"stage {step}", step=step)
    assert caplog.text.count("the ledger is behind") == 1
    assert read_status(tmp_path).stage == "starting"
    disk.is_full = False
    ledger.update(stage="training")
    assert (read_status(tmp_path).stage, read_status(tmp_path).step) == ("training", 2)
    ledger.close()


def test_the_heartbeat_outlives_a_full_disk_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("IDLE_HEARTBEAT_EVERY_S", "HEARTBEAT_EVERY_S"):
        monkeypatch.setattr(ledger_module, name, 0.01)
    disk = FullDisk(tmp_path, monkeypatch)
    ledger = Ledger.open(tmp_path)
    ledger.begin(max_steps=10)
    with caplog.at_level(logging.WARNING):
        disk.is_full = True
        deadline = time.monotonic() + 5
        while caplog.text.count("the heartbeat cannot be written") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    disk.is_full = False
    is_free_again = time.time()
    while (read_status(tmp_path).heartbeat_at or 0.0) < is_free_again:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ledger.close()

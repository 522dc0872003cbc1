"""A checkpoint that is written while training goes on is the one of the step at which it was asked for."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra.runtime import background, checkpoint, safetensors_format
from hydra.runtime.background import BackgroundSaver
from hydra.runtime.checkpoint import Checkpoint, check_checkpoint, list_checkpoints, save_checkpoint

TIMEOUT_S = 30.0


def make() -> Checkpoint:
    tensors = {"model": {"weight": torch.randn(40, 30)}, "optimizer": {"weight/step": torch.tensor(3.0)}}
    return Checkpoint(tensors, {"step": 1})


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The thread waits after its first piece until this is set; whoever else writes does not."""
    event, real = threading.Event(), checkpoint.saving

    def waiting(*args: Any) -> Iterator[None]:
        for _ in real(*args):
            yield
            if threading.current_thread() is not threading.main_thread():
                event.wait(TIMEOUT_S)

    monkeypatch.setattr(background, "saving", waiting)
    return event


def test_what_changes_after_the_call_is_not_in_it(tmp_path: Path, held: threading.Event) -> None:
    saver, saved = BackgroundSaver(), make()
    (tmp_path / "expected").mkdir()
    save_checkpoint(tmp_path / "expected", 1, saved, keep_last=1)
    saver.save(tmp_path, 1, saved, 1)
    saved.tensors["model"]["weight"].zero_()
    saved.tensors["optimizer"]["weight/step"].add_(1)
    assert list_checkpoints(tmp_path) == []
    held.set()
    saver.finish()
    (directory,), (expected,) = list_checkpoints(tmp_path), list_checkpoints(tmp_path / "expected")
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {
        path.name: path.read_bytes() for path in expected.iterdir()
    }


def test_whoever_waits_writes_the_rest_himself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_format, "PIECE_BYTES", 8)
    writers: set[str] = set()
    real, has_begun = checkpoint.saving, threading.Event()

    def noted(*args: Any) -> Iterator[None]:
        for _ in real(*args):
            writers.add(threading.current_thread().name)
            yield
            if threading.current_thread() is not threading.main_thread():
                has_begun.set()
                saver._hurry.wait(TIMEOUT_S)

    monkeypatch.setattr(background, "saving", noted)
    saver = BackgroundSaver()
    saver.save(tmp_path, 1, make(), 1)
    assert has_begun.wait(TIMEOUT_S)
    saver.finish()
    assert writers == {"checkpoint", threading.main_thread().name}
    check_checkpoint(list_checkpoints(tmp_path)[0])


def test_the_thread_runs_when_nothing_else_wants_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policies: list[int] = []

    def noted(*args: Any) -> Iterator[None]:
        policies.append(os.sched_getscheduler(0))
        yield

    monkeypatch.setattr(background, "saving", noted)
    saver = BackgroundSaver()
    saver.save(tmp_path, 1, make(), 1)
    assert saver._thread is not None
    saver._thread.join(TIMEOUT_S)
    assert policies == [os.SCHED_IDLE]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_copies_are_made_once_and_saves_follow_each_other(tmp_path: Path) -> None:
    saver = BackgroundSaver()
    assert not saver.is_ready
    saver.reserve(make())
    assert saver.is_ready
    places = {name: tensor.data_ptr() for name, tensor in saver._copies["model"].items()}
    for step in (1, 2, 3):
        saver.save(tmp_path, step, make(), 2)
    saver.finish()
    saver.finish()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert places == {name: tensor.data_ptr() for name, tensor in saver._copies["model"].items()}


@pytest.mark.parametrize("again", ["finish", "save"])
def test_a_refused_call_is_raised_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str) -> None:
    def refused(*args: Any) -> Iterator[None]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield

    saver = BackgroundSaver()
    with monkeypatch.context() as context:
        context.setattr(background, "saving", refused)
        saver.save(tmp_path, 1, make(), 1)
        assert saver._thread is not None
        saver._thread.join(TIMEOUT_S)
    assert saver.has_failed
    with pytest.raises(OSError, match="No space"):
        saver.finish() if again == "finish" else saver.save(tmp_path, 2, make(), 1)
    assert not saver.has_failed
    saver.save(tmp_path, 2, make(), 1)
    saver.finish()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]

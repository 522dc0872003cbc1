"""A checkpoint that is written while training goes on is the one of the step at which it was asked for."""

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra.runtime import background, safetensors_format
from hydra.runtime.background import BackgroundSaver
from hydra.runtime.checkpoint import Checkpoint, check_checkpoint, list_checkpoints, save_checkpoint

TIMEOUT_S = 30.0


def make() -> Checkpoint:
    tensors = {"model": {"weight": torch.randn(40, 30)}, "optimizer": {"weight/step": torch.tensor(3.0)}}
    return Checkpoint(tensors, {"step": 1, "skipped_steps": [1]})


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def expected(tmp_path: Path, saved: Checkpoint) -> dict[str, bytes]:
    (tmp_path / "expected").mkdir()
    return content(save_checkpoint(tmp_path / "expected", 1, saved, keep_last=1))


@pytest.fixture
def saved() -> Checkpoint:
    return make()


@pytest.mark.parametrize("n_pieces", [0, 3, 10_000])
def test_it_is_the_checkpoint_of_the_call_whoever_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Checkpoint, expected: dict[str, bytes], n_pieces: int
) -> None:
    """By `finish` alone, by both, or by `advance` and its thread."""
    monkeypatch.setattr(safetensors_format, "PIECE_BYTES", 8)
    saver = BackgroundSaver()
    saver.save(tmp_path, 1, saved, 1)
    saved.tensors["model"]["weight"].zero_()
    saved.tensors["optimizer"]["weight/step"].add_(1)
    saved.trainer_state["skipped_steps"].append(2)
    assert list_checkpoints(tmp_path) == []
    for _ in range(n_pieces):
        saver.advance(0.0)
    if n_pieces == 10_000:
        assert saver._thread is not None
        saver._thread.join(TIMEOUT_S)
    else:
        assert list_checkpoints(tmp_path) == []
        saver.finish()
    (directory,) = list_checkpoints(tmp_path)
    assert content(directory) == expected


def test_a_call_writes_a_piece_at_least_and_no_longer_than_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Checkpoint
) -> None:
    written: list[int] = []

    def hundred(*args: Any) -> Iterator[bool]:
        for piece in range(100):
            time.sleep(0.001)
            written.append(piece)
            yield False

    monkeypatch.setattr(background, "save_in_pieces", hundred)
    saver = BackgroundSaver()
    saver.save(tmp_path, 1, saved, 1)
    for n_written in range(5):
        assert len(written) == n_written
        saver.advance(0.0)
    saver.advance(0.01)
    assert 6 < len(written) < 50
    saver.advance(TIMEOUT_S)
    assert len(written) == 100


def test_nothing_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Checkpoint) -> None:
    is_there, real = threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        assert threading.current_thread() is not threading.main_thread()
        is_there.wait(TIMEOUT_S)
        real(descriptor)

    saver = BackgroundSaver()
    saver.save(tmp_path, 1, saved, 1)
    with monkeypatch.context() as context:
        context.setattr(os, "fsync", slow)
        for _ in range(100):
            saver.advance(TIMEOUT_S)
        assert list_checkpoints(tmp_path) == []
        is_there.set()
        saver.finish()
    check_checkpoint(list_checkpoints(tmp_path)[0])


def test_copies_are_made_once_and_saves_follow_each_other(tmp_path: Path) -> None:
    saver = BackgroundSaver()
    saver.advance(0.0)
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


@pytest.mark.parametrize("where", ["a piece", "the disk"])
@pytest.mark.parametrize("again", ["advance", "finish", "save"])
def test_a_refused_call_is_raised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str, where: str) -> None:
    def refused(*args: Any) -> Iterator[bool]:
        if where == "the disk":
            yield True
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saver = BackgroundSaver()
    with monkeypatch.context() as context:
        context.setattr(background, "save_in_pieces", refused)
        saver.save(tmp_path, 1, make(), 1)
        if where == "the disk":
            saver.advance(0.0)
            assert saver._thread is not None
            saver._thread.join(TIMEOUT_S)
        with pytest.raises(OSError, match="No space"):
            saver.save(tmp_path, 2, make(), 1) if again == "save" else getattr(saver, again)(
                *[0.0][again != "advance" :]
            )
    saver.save(tmp_path, 2, make(), 1)
    saver.finish()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]

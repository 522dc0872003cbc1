"""A checkpoint is whole or does not exist, and a changed byte in it is found."""

from pathlib import Path

import pytest
import torch

from hydra.errors import CheckpointError
from hydra.runtime.checkpoint import (
    Checkpoint,
    check_checkpoint,
    checkpoint_directory,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    save_checkpoint,
    step_of,
)

GROUPS = ("model", "optimizer")


def make(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weights = {"weight": torch.randn(5, 3, generator=generator), "half": torch.ones(2, dtype=torch.bfloat16)}
    return Checkpoint({"model": weights, "optimizer": {"weight/step": torch.tensor(float(step))}}, {"step": step})


def test_round_trip_keeps_bits_and_only_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, step, make(step), keep_last=2)
    assert [directory.name for directory in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000015"]
    loaded = load_checkpoint(list_checkpoints(tmp_path)[-1], GROUPS)
    assert loaded.trainer_state == {"step": 15}
    for group, tensors in make(15).tensors.items():
        assert loaded.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(loaded.tensors[group][name], tensor)
            assert loaded.tensors[group][name].dtype == tensor.dtype


FILES = ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = save_checkpoint(tmp_path, 1, make(1), keep_last=1) / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[-1] ^= 1
        path.write_bytes(content if damage == "flip" else content[:-3])
    for refuse in (check_checkpoint, lambda directory: load_checkpoint(directory, GROUPS)):
        with pytest.raises(CheckpointError, match=name):
            refuse(path.parent)


@pytest.mark.parametrize("name", FILES)
def test_the_one_before_a_damaged_one_is_used(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, make(step), keep_last=3)
    assert newest_whole(tmp_path) == checkpoint_directory(tmp_path, 3)
    for step in (3, 2):
        path = checkpoint_directory(tmp_path, step) / name
        path.write_bytes(path.read_bytes()[:-1])
    assert newest_whole(tmp_path) == checkpoint_directory(tmp_path, 1)
    assert [step_of(directory) for directory in list_checkpoints(tmp_path)] == [1, 2, 3]  # a reader moves nothing
    assert newest_whole(tmp_path, sets_aside=True) == checkpoint_directory(tmp_path, 1)
    assert name in caplog.text
    assert {entry.name for entry in (tmp_path / "checkpoints").iterdir()} == {
        "step-00000001",
        "damaged-step-00000002",
        "damaged-step-00000003",
    }
    save_checkpoint(tmp_path, 2, make(2), keep_last=3)
    checkpoint_directory(tmp_path, 2).joinpath(name).unlink()
    newest_whole(tmp_path, sets_aside=True)
    assert (tmp_path / "checkpoints" / "damaged-step-00000002-2").is_dir()


def test_swapped_files_are_found(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path, 1, make(1), keep_last=1)
    model, optimizer = directory / "model.safetensors", directory / "optimizer.safetensors"
    content = model.read_bytes()
    model.write_bytes(optimizer.read_bytes())
    optimizer.write_bytes(content)
    with pytest.raises(CheckpointError, match="model"):
        check_checkpoint(directory)
    assert newest_whole(tmp_path) is None


def test_named_steps_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, make(step), keep_last=1, keep_steps=[2])
    assert [step_of(directory) for directory in list_checkpoints(tmp_path)] == [2, 4]


def test_what_is_not_ours_is_neither_counted_nor_removed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, make(1), keep_last=1)
    folder = tmp_path / "checkpoints"
    (folder / "precious").mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "step-00000009-backup").mkdir()
    (folder / "step-00000009-backup" / "manifest.json").write_text("{}")
    save_checkpoint(tmp_path, 2, make(2), keep_last=1)
    assert [directory.name for directory in list_checkpoints(tmp_path)] == ["step-00000002"]
    names = {entry.name for entry in folder.iterdir()}
    assert names == {"precious", "notes.txt", "step-00000009-backup", "step-00000002"}


def test_what_was_never_finished_is_cleared(tmp_path: Path) -> None:
    for name in (".writing-step-00000009", ".removing-step-00000007"):
        half = tmp_path / "checkpoints" / name
        half.mkdir(parents=True)
        (half / "model.safetensors").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []
    path = save_checkpoint(tmp_path, 9, make(9), keep_last=1)
    assert load_checkpoint(path, GROUPS).trainer_state == {"step": 9}
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-00000009"]

"""Writing a checkpoint, cut off or refused before each of its file-system calls; and each of its files damaged."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hydra.data import open_dataset
from hydra.errors import CheckpointError, DataError
from hydra.runtime import Run
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
from hydra.runtime.disk import is_disk_full
from hydra.runtime.sums import find_altered_files
from hydra.testing import faults, storm

MakeRun = Callable[..., Path]
KEPT = 2
GROUPS = ("model", "optimizer", "rng")
SHORT = {"max_steps": 30, "micro_batch_size": 2, "checkpoint_every": 4}


def make(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    tensors = {group: {"weight": torch.randn(40, 30, generator=generator)} for group in GROUPS}
    return Checkpoint(tensors, {"step": step})


def save_in_child(
    run_dir: Path, step: int, fault: Callable[..., None], call: int, *, in_background: bool = False
) -> int:
    """Save in a process of its own under the fault; returns its exit status, 28 when the disk was found full."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            fault(save=1, call=call)
            from hydra.runtime import background, checkpoint

            if in_background:
                background.save_in_pieces = checkpoint.save_in_pieces
                saver = background.BackgroundSaver()
                saver.save(run_dir, step, make(step), KEPT)
                for _ in range(100):
                    saver.advance(0.0)
                saver.finish()
            else:
                checkpoint.save_checkpoint(run_dir, step, make(step), keep_last=KEPT)
            status = 0
        except OSError as error:
            status = 28 if is_disk_full(error) else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content_equals(directory: Path, step: int) -> bool:
    loaded = load_checkpoint(directory, GROUPS)
    return loaded.trainer_state == {"step": step} and all(
        torch.equal(loaded.tensors[group]["weight"], make(step).tensors[group]["weight"]) for group in GROUPS
    )


def first(run_dir: Path) -> list[int]:
    return []


def over_retention(run_dir: Path) -> list[int]:
    for step in (1, 2):
        save_checkpoint(run_dir, step, make(step), keep_last=KEPT)
    return [1, 2]


def over_what_a_crash_left(run_dir: Path) -> list[int]:
    steps = over_retention(run_dir)
    assert save_in_child(run_dir, 3, faults.crash_in_save, 14) == faults.KILLED
    shutil.copytree(checkpoint_directory(run_dir, 1), run_dir / "checkpoints" / ".removing-step-00000000")
    assert len(list((run_dir / "checkpoints").iterdir())) == 4
    return steps


def over_one_that_was_damaged(run_dir: Path) -> list[int]:
    """The step is saved again, as a run does that went on from before it."""
    over_retention(run_dir)
    save_checkpoint(run_dir, 3, make(3), keep_last=KEPT)
    (checkpoint_directory(run_dir, 3) / "model.safetensors").write_bytes(b"damaged")
    assert newest_whole(run_dir, sets_aside=True) == checkpoint_directory(run_dir, 2)
    return [2]


def over_itself(run_dir: Path) -> list[int]:
    """The same step is there already."""
    over_retention(run_dir)
    save_checkpoint(run_dir, 3, make(3), keep_last=KEPT)
    return [2, 3]


@pytest.mark.parametrize("fault", [faults.crash_in_save, faults.full_disk_in_save])
@pytest.mark.parametrize(
    ("prepare", "fewest_calls", "in_background"),
    [
        (first, 32, False),
        (over_retention, 40, False),
        (over_retention, 40, True),
        (over_what_a_crash_left, 44, False),
        (over_one_that_was_damaged, 30, False),
        (over_itself, 0, False),
    ],
)
def test_a_save_cut_off_or_refused_at_each_of_its_calls(
    tmp_path: Path,
    prepare: Callable[[Path], list[int]],
    fewest_calls: int,
    in_background: bool,
    fault: Callable[..., None],
) -> None:
    template = tmp_path / "template"
    template.mkdir()
    before = prepare(template)
    expected_end = {f"step-{step:08d}" for step in [*before, 3] if step >= 2}
    call, status = 0, -1
    while status != 0:
        call += 1
        run_dir = Path(shutil.copytree(template, tmp_path / f"{call}"))
        status = save_in_child(run_dir, 3, fault, call, in_background=in_background)
        assert status in (0, 28 if fault is faults.full_disk_in_save else faults.KILLED), call
        if fault is faults.full_disk_in_save and prepare is not over_what_a_crash_left:
            assert not list((run_dir / "checkpoints").glob(".writing-*")), call
        for listed in list_checkpoints(run_dir):
            check_checkpoint(listed)  # a name is given last and taken first
        newest = newest_whole(run_dir, sets_aside=True)
        assert newest is not None or not before, call
        if newest is not None:
            assert step_of(newest) in (3, max(before, default=3)), call
            assert content_equals(newest, step_of(newest)), call
        damaged = [path.name for path in (run_dir / "checkpoints").glob("damaged-*")] if newest else []
        assert damaged == [path.name for path in (template / "checkpoints").glob("damaged-*")], call
        save_checkpoint(run_dir, 3, make(3), keep_last=KEPT)
        assert content_equals(checkpoint_directory(run_dir, 3), 3), call
        assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {*expected_end, *damaged}, call
        shutil.rmtree(run_dir)
    assert call > fewest_calls


def test_crashes_one_after_the_other_leave_nothing_that_hinders_the_next(tmp_path: Path) -> None:
    over_retention(tmp_path)
    call = 1
    while save_in_child(tmp_path, 3, faults.crash_in_save, call) == faults.KILLED:
        newest = newest_whole(tmp_path)
        assert newest is not None
        assert content_equals(newest, step_of(newest))
        call += 1
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000002", "step-00000003"}


# -------------------------------------------------------------------- through the trainer


@pytest.fixture(scope="module")
def undisturbed(make_run: MakeRun) -> Path:
    run_dir = make_run("undisturbed", **SHORT, keep_checkpoints=100)
    storm.finish(run_dir)
    return run_dir


@pytest.mark.parametrize(("save", "in_background"), [(1, False), (4, False), (4, True)])
def test_a_trainer_that_dies_in_a_save_goes_on(
    make_run: MakeRun, undisturbed: Path, moments: random.Random, save: int, in_background: bool
) -> None:
    run_dir = make_run("crashed", **SHORT, checkpoints_in_background=in_background)
    call = moments.randint(1, 30 if save == 1 else 40)
    print("call", call)
    storm.finish(run_dir, [{"fault": "crash_in_save", "save": save, "call": call}], faults.KILLED)
    storm.finish(run_dir)
    assert storm.differences(run_dir, undisturbed) == []


def test_a_full_disk_ends_a_run_that_goes_on_once_there_is_room(
    make_run: MakeRun, undisturbed: Path, moments: random.Random
) -> None:
    """The system itself refuses to let a file grow, at a size that some file of a checkpoint has."""
    run_dir = make_run("full", **SHORT)
    process = storm.start_trainer(run_dir)
    while storm.newest_step(run_dir) == 0 and process.poll() is None:
        pass
    storm.kill_group(process)
    process.communicate()
    before = storm.newest_step(run_dir)
    assert before > 0
    limit = moments.randint(60_000, 180_000)
    print("limit", limit)
    errors = storm.finish(run_dir, [{"fault": "file_size_limit", "n_bytes": limit}], 1)
    assert "disk is full" in errors
    assert "Traceback" not in errors
    status = Run.open(run_dir).status()
    assert (status.status, status.cause) == ("failed", "disk full")
    assert newest_whole(run_dir) == checkpoint_directory(run_dir, before)
    storm.finish(run_dir)
    assert storm.differences(run_dir, undisturbed) == []


@pytest.mark.parametrize("in_background", [False, True])
def test_a_run_may_go_on_without_the_checkpoint_for_which_there_was_no_room(
    make_run: MakeRun, undisturbed: Path, moments: random.Random, in_background: bool
) -> None:
    fields = {"when_disk_is_full": "go_on", "keep_checkpoints": 100, "checkpoints_in_background": in_background}
    run_dir = make_run("goes_on", **SHORT, **fields)
    call = moments.randint(1, 18)
    print("call", call)
    errors = storm.finish(run_dir, [{"fault": "full_disk_in_save", "save": 4, "call": call}])
    assert "step 12 must be written, but the disk is full" in errors
    assert "going on without it" in errors
    steps = list(map(step_of, list_checkpoints(run_dir)))
    assert 12 not in steps
    assert {8, 16} <= set(steps)
    assert storm.differences(run_dir, undisturbed) == []


def test_a_disk_without_room_is_refused_before_the_first_step(make_run: MakeRun) -> None:
    run_dir = make_run("small_disk", **SHORT)
    errors = storm.finish(run_dir, [{"fault": "small_disk", "n_bytes": 100_000}], 1)
    assert "MB are missing" in errors
    status = Run.open(run_dir).status()
    assert (status.status, status.cause, status.step) == ("failed", "disk full", 0)
    storm.finish(run_dir)


# -------------------------------------------------------------------- bit rot


def test_any_damage_to_any_file_of_a_checkpoint_is_found(
    undisturbed: Path, tmp_path: Path, moments: random.Random, caplog: pytest.LogCaptureFixture
) -> None:
    newest = list_checkpoints(undisturbed)[-1]
    n_found = 0
    for name, damage in storm.every_damage(newest):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        for kept in list_checkpoints(undisturbed)[-2:]:
            shutil.copytree(kept, tmp_path / "checkpoints" / kept.name)
        damaged = checkpoint_directory(tmp_path, step_of(newest))
        damage(damaged / name, moments)
        for refuse in (check_checkpoint, lambda directory: load_checkpoint(directory, GROUPS)):
            with pytest.raises(CheckpointError, match=str(damaged)):
                refuse(damaged)
        caplog.clear()
        content = {path.name: path.read_bytes() for path in damaged.iterdir()}
        assert newest_whole(tmp_path, sets_aside=True) == checkpoint_directory(tmp_path, 28)
        assert str(damaged) in caplog.text
        aside = damaged.with_name(f"damaged-{damaged.name}")
        assert {path.name: path.read_bytes() for path in aside.iterdir()} == content
        n_found += 1
    assert n_found == 5 * len(storm.DAMAGES)


@pytest.mark.parametrize("damage", [storm.flip_bit, storm.delete, storm.swap])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    make_run: MakeRun, undisturbed: Path, moments: random.Random, damage: storm.Damage
) -> None:
    run_dir = Path(shutil.copytree(undisturbed, make_run("rotten", **SHORT).with_name("rotten_copy")))
    storm.cut_off_after(run_dir, 16)
    newest = list_checkpoints(run_dir)[-1]
    name = moments.choice(sorted(path.name for path in newest.iterdir()))
    print("file", name)
    damage(newest / name, moments)
    storm.finish(run_dir)
    log = (run_dir / "trainer.log").read_text()
    assert f"{newest}/" in log
    assert f"going on from {checkpoint_directory(run_dir, 12)}" in log
    assert (newest.with_name(f"damaged-{newest.name}")).is_dir()
    assert storm.differences(run_dir, undisturbed) == []


def test_a_finished_run_whose_last_checkpoint_is_damaged_is_finished_again(
    make_run: MakeRun, undisturbed: Path, moments: random.Random
) -> None:
    run_dir = Path(shutil.copytree(undisturbed, make_run("rotten", **SHORT).with_name("rotten_end")))
    newest = list_checkpoints(run_dir)[-1]
    storm.flip_bit(newest / "model.safetensors", moments)
    storm.finish(run_dir)
    assert "instead of it step-00000028 is used" in (run_dir / "trainer.log").read_text()
    assert storm.differences(run_dir, undisturbed) == []
    assert find_altered_files(run_dir) == []
    # One whose checkpoints were cleared away is left as it is.
    shutil.rmtree(newest.parent)
    storm.finish(run_dir)
    assert not newest.parent.exists()


def test_any_damage_to_any_shard_is_found(undisturbed: Path, tmp_path: Path, moments: random.Random) -> None:
    config, manifest = Run.open(undisturbed).config(), Run.open(undisturbed).manifest()
    fingerprint = str(manifest["fingerprint"])
    shards = Path(str(config["data_dir"])) / fingerprint
    n_found = 0
    for path in sorted(shards.glob("*.bin")):
        for damage in storm.DAMAGES:
            shutil.rmtree(tmp_path / fingerprint, ignore_errors=True)
            shutil.copytree(shards, tmp_path / fingerprint)
            damage(tmp_path / fingerprint / path.name, moments)
            with pytest.raises(DataError, match=str(tmp_path / fingerprint)):
                open_dataset(manifest, tmp_path)
            n_found += 1
    assert n_found >= 2 * len(storm.DAMAGES)


def test_a_damaged_shard_is_named_before_the_first_step(
    make_run: MakeRun, undisturbed: Path, tmp_path: Path, moments: random.Random
) -> None:
    run_dir = make_run("rotten_data", **SHORT, data_dir=str(tmp_path / "data"))
    process = storm.start_trainer(run_dir)
    storm.wait_until(process, run_dir, storm.AT_WORK)
    storm.kill_group(process)
    process.communicate()
    shard = moments.choice(sorted((tmp_path / "data").rglob("*.bin")))
    whole, damage = shard.read_bytes(), moments.choice((storm.flip_bit, storm.truncate, storm.delete))
    print(shard.name, damage.__name__)
    damage(shard, moments)
    errors = storm.finish(run_dir, status=1)
    assert shard.name in errors
    assert shard.name in (Run.open(run_dir).status().message or "")
    shard.write_bytes(whole)
    storm.finish(run_dir)
    assert storm.differences(run_dir, undisturbed) == []

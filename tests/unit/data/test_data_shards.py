"""Shards: the stream they hold, and every way in which they can be damaged."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from hydra.data import Dataset, open_dataset
from hydra.data import shards as shards_module
from hydra.data.shards import STAMP_FILE, ShardWriter, TokenStream, file_sha256
from hydra.errors import DataError


def test_stream_over_several_shards_reads_as_one(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 60_000, size=1003)
    writer = ShardWriter(tmp_path, "train", "<u2", n_tokens_per_shard=100)
    for part in np.split(tokens, [1, 5, 250, 251, 900]):
        writer.write(part)
    writer.close()
    assert [shard["n_tokens"] for shard in writer.shards] == [100] * 10 + [3]
    assert all(file_sha256(tmp_path / shard["file"]) == shard["sha256"] for shard in writer.shards)
    assert all((tmp_path / shard["file"]).stat().st_size == shard["n_bytes"] for shard in writer.shards)
    stream = TokenStream(tmp_path, writer.shards, "<u2")
    assert len(stream) == 1003
    for start, stop in [(0, 1003), (0, 100), (99, 101), (100, 200), (150, 451), (1002, 1003), (1003, 1003)]:
        np.testing.assert_array_equal(stream.read(start, stop), tokens[start:stop])
    np.testing.assert_array_equal(np.concatenate(list(stream.chunks(77))), tokens)


def shard_of(dataset: Dataset) -> Path:
    return dataset.directory / dataset.manifest["splits"]["train"]["shards"][0]["file"]


def reopen(dataset: Dataset) -> Dataset:
    return open_dataset(dataset.manifest, dataset.directory.parent)


@pytest.fixture
def is_large(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataset is one of those that are read in full the first time alone, which has been."""
    monkeypatch.setattr(shards_module, "READ_AT_EVERY_START_BYTES", 0)
    reopen(dataset)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


def test_missing_shard_is_named(dataset: Dataset) -> None:
    shard_of(dataset).unlink()
    with pytest.raises(DataError, match=r"train-00000\.bin is missing; delete the folder .* it is rebuilt"):
        reopen(dataset)


def test_truncated_shard_is_named(dataset: Dataset) -> None:
    size = shard_of(dataset).stat().st_size
    os.truncate(shard_of(dataset), size - 2)
    with pytest.raises(DataError, match=rf"train-00000\.bin must have {size} bytes, but got {size - 2}"):
        reopen(dataset)


@pytest.mark.usefixtures("is_large")
def test_changed_shard_is_named(dataset: Dataset) -> None:
    flip_a_byte(shard_of(dataset))
    with pytest.raises(DataError, match=r"train-00000\.bin must have the SHA-256 .*it was changed"):
        reopen(dataset)
    with pytest.raises(DataError, match="it was changed"):  # the refusal must not be noted as a check
        reopen(dataset)


@pytest.mark.usefixtures("is_large")
def test_changed_shard_with_its_time_set_back_is_named(dataset: Dataset) -> None:
    stat = shard_of(dataset).stat()
    flip_a_byte(shard_of(dataset))
    os.utime(shard_of(dataset), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match="it was changed"):
        reopen(dataset)


def test_changed_tokenizer_is_named(dataset: Dataset) -> None:
    (dataset.directory / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json must have the SHA-256"):
        reopen(dataset)


def test_what_the_disk_alone_has_changed_is_named(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """No time of the file tells: the note that a large dataset has beside it agrees with what is there."""
    with monkeypatch.context() as is_large:
        is_large.setattr(shards_module, "READ_AT_EVERY_START_BYTES", 0)
        reopen(dataset)
        flip_a_byte(shard_of(dataset))
        stat, stamp = shard_of(dataset).stat(), dataset.directory / STAMP_FILE
        noted = json.loads(stamp.read_text())
        noted[shard_of(dataset).name] |= {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
        stamp.write_text(json.dumps(noted))
        reopen(dataset)  # unseen, as is said there
    with pytest.raises(DataError, match=r"train-00000\.bin must have the SHA-256 .*it was changed"):
        reopen(dataset)


@pytest.mark.parametrize("n_bytes", [-1, 0])
def test_a_dataset_up_to_the_limit_is_read_at_every_start(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, n_bytes: int
) -> None:
    shards = [shard for split in dataset.manifest["splits"].values() for shard in split["shards"]]
    limit = sum(shard["n_bytes"] for shard in shards) + n_bytes
    monkeypatch.setattr(shards_module, "READ_AT_EVERY_START_BYTES", limit)
    reopen(dataset)
    assert (dataset.directory / STAMP_FILE).exists() is (n_bytes < 0)


@pytest.mark.usefixtures("is_large")
def test_full_check_of_a_large_dataset_happens_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def spy(path: Path) -> str:
        read.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(shards_module, "file_sha256", spy)
    reopen(dataset)
    assert read == []
    os.utime(shard_of(dataset))  # touched: read in full once more
    reopen(dataset)
    reopen(dataset)
    assert read == ["train-00000.bin"]
    (dataset.directory / STAMP_FILE).write_text("{half")  # a damaged note is no check
    reopen(dataset)
    assert read[1:] == ["tokenizer.json", "train-00000.bin", "validation-00000.bin"]


def test_copied_data_dir_opens(dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(dataset.directory.parent, tmp_path / "elsewhere")
    moved = open_dataset(json.loads(json.dumps(dataset.manifest)), tmp_path / "elsewhere")
    np.testing.assert_array_equal(
        moved.train_batch(3, seed=1, n_rows=2, n_tokens=8).inputs_BT,
        dataset.train_batch(3, seed=1, n_rows=2, n_tokens=8).inputs_BT,
    )


@pytest.mark.usefixtures("is_large")
def test_data_dir_that_may_only_be_read_opens(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    (dataset.directory / STAMP_FILE).unlink()

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "replace", refuse)
    reopen(dataset)
    assert not list(dataset.directory.glob(f"{STAMP_FILE}*"))


def test_manifest_of_another_build_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    manifest = json.loads(json.dumps(dataset.manifest))
    manifest["splits"]["validation"]["shards"][0]["sha256"] = "0" * 64
    with pytest.raises(DataError, match=r"validation-00000\.bin .* another build than the manifest"):
        open_dataset(manifest, dataset.directory.parent)
    with pytest.raises(DataError, match=f"{dataset.manifest['fingerprint']} must lie under data_dir"):
        open_dataset(dataset.manifest, tmp_path / "nowhere")
    with pytest.raises(DataError, match="format_version 1"):
        open_dataset({**dataset.manifest, "format_version": 0}, dataset.directory.parent)
    with pytest.raises(DataError, match="64 hexadecimal digits"):
        open_dataset({**dataset.manifest, "fingerprint": "../x"}, dataset.directory.parent)

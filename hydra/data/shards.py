"""Shards: files of little-endian integers, written once, read by memory map, checked against their manifest."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hydra.errors import DataError

log = logging.getLogger(__name__)

N_TOKENS_PER_SHARD = 1 << 26
STAMP_FILE = "verified.json"
READ_AT_EVERY_START_BYTES = 1 << 28  # SHA-256 takes about a second for a GB


class ShardWriter:
    """Writes one split's token stream as <split>-00000.bin, <split>-00001.bin, ..."""

    def __init__(self, directory: Path, split: str, dtype: str, n_tokens_per_shard: int) -> None:
        """dtype: "<u2" or "<u4". n_tokens_per_shard: of every shard but the last."""
        self.shards: list[dict[str, Any]] = []  # the manifest's entries of the finished shards
        self._directory, self._split, self._dtype = directory, split, np.dtype(dtype)
        self._n_tokens_per_shard = n_tokens_per_shard
        self._file: BinaryIO | None = None
        self._n_tokens = 0

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens: integers [any] that fit the dtype."""
        while len(tokens):
            if self._file is None:
                name = f"{self._split}-{len(self.shards):05d}.bin"
                self._file, self._n_tokens, self._sha256 = (self._directory / name).open("wb"), 0, hashlib.sha256()
            part = tokens[: self._n_tokens_per_shard - self._n_tokens]
            data = part.astype(self._dtype).tobytes()
            self._file.write(data)
            self._sha256.update(data)
            self._n_tokens += len(part)
            tokens = tokens[len(part) :]
            if self._n_tokens == self._n_tokens_per_shard:
                self._finish_shard(self._file)

    def close(self) -> None:
        """Finish the last shard. Every shard is on the disk then."""
        if self._file is not None:
            self._finish_shard(self._file)

    def _finish_shard(self, file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self.shards.append({
            "file": Path(file.name).name,
            "n_tokens": self._n_tokens,
            "n_bytes": self._n_tokens * self._dtype.itemsize,
            "sha256": self._sha256.hexdigest(),
        })  # fmt: skip
        self._file = None


class TokenStream:
    """The tokens of consecutive shards as one sequence."""

    def __init__(self, directory: Path, shards: Sequence[Mapping[str, Any]], dtype: str) -> None:
        """shards: their entries in the manifest, in order."""
        self._shards = [np.memmap(directory / shard["file"], dtype=dtype, mode="r") for shard in shards]
        self._starts = np.cumsum([0, *map(len, self._shards)])

    def __len__(self) -> int:
        """Tokens in all shards."""
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1, int64 [stop - start]."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        tokens = np.empty(stop - start, dtype=np.int64)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for shard, shard_start in zip(self._shards[first:], self._starts[first:].tolist(), strict=False):
            if shard_start >= stop:
                break
            part = shard[max(start - shard_start, 0) : stop - shard_start]
            offset = max(shard_start - start, 0)
            tokens[offset : offset + len(part)] = part
        return tokens

    def chunks(self, n_tokens: int) -> Iterator[np.ndarray]:
        """The whole stream in order, int64 [n_tokens] each, the last one shorter."""
        for start in range(0, len(self), n_tokens):
            yield self.read(start, min(start + n_tokens, len(self)))


def check_shards(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Raise DataError, naming the file, unless every shard and the tokenizer are what the manifest says.

    Up to READ_AT_EVERY_START_BYTES together they are read in full (SHA-256) at every start: a disk that gives back
    other bytes than it was given changes no time of a file. Of larger datasets each file is read the first time, and
    its size and times are noted in STAMP_FILE beside; while these stay the same it is not read again, and what the
    disk alone has changed goes unseen. The times are mtime and ctime, since anybody can set mtime back.
    """
    wanted = {"tokenizer.json": manifest["tokenizer"]["sha256"]}
    sizes: dict[str, int] = {}
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            wanted[shard["file"]] = shard["sha256"]
            sizes[shard["file"]] = shard["n_bytes"]
    remedy = f"delete the folder {directory} and start the run again: it is rebuilt from the corpus"
    is_read_at_every_start = sum(sizes.values()) <= READ_AT_EVERY_START_BYTES
    noted = {} if is_read_at_every_start else _read_stamp(directory)
    found: dict[str, dict[str, Any]] = {}
    for name, sha256 in wanted.items():
        path = directory / name
        if not path.is_file():
            raise DataError(f"Every file that the manifest names must be there, but {path} is missing; {remedy}")
        stat = path.stat()
        if name in sizes and stat.st_size != sizes[name]:
            raise DataError(f"{path} must have {sizes[name]} bytes, but got {stat.st_size}: it was cut off; {remedy}")
        times = {"n_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
        known = noted.get(name, {})
        unchanged = all(known.get(key) == value for key, value in times.items())
        found[name] = {**times, "sha256": known["sha256"] if unchanged else file_sha256(path)}
        if found[name]["sha256"] != sha256:
            raise DataError(
                f"{path} must have the SHA-256 {sha256}, but got {found[name]['sha256']}: it was changed, or is of "
                f"another build than the manifest; {remedy}"
            )
    if found != noted and not is_read_at_every_start:
        log.info("checked %d files in %s in full", len(found), directory)
        _write_stamp(directory, found)


def file_sha256(path: Path) -> str:
    """Of the file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, text: str) -> None:
    """Write a small text file and have it on the disk before returning."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read_stamp(directory: Path) -> dict[str, dict[str, Any]]:
    try:
        stamp = json.loads((directory / STAMP_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}  # never checked, or the note is damaged: everything is read in full
    return stamp if isinstance(stamp, dict) else {}


def _write_stamp(directory: Path, stamp: dict[str, dict[str, Any]]) -> None:
    temporary = directory / f"{STAMP_FILE}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps(stamp, indent=1), encoding="utf-8")
        temporary.replace(directory / STAMP_FILE)
    except OSError as error:
        # A data_dir that one may only read is fine; it costs a full check at every start.
        log.info("cannot note in %s that its files were checked: %s", directory, error)
        with contextlib.suppress(OSError):
            temporary.unlink()

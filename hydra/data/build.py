"""From a DataSpec to a folder of shards, built once and found again by its fingerprint."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hydra.data.corpora import Corpus, read_corpus, text_sha256
from hydra.data.loader import Dataset
from hydra.data.shards import N_TOKENS_PER_SHARD, ShardWriter, TokenStream, check_shards, file_sha256, write_synced
from hydra.data.spec import BOS_TOKEN, DataSpec
from hydra.data.tokenizer import (
    build_tokenizer,
    check_lossless,
    encode_documents,
    for_text,
    read_tokenizer,
    tokenizer_identity,
    vocabulary_size,
)
from hydra.data.yardsticks import compute_yardsticks
from hydra.errors import DataError

log = logging.getLogger(__name__)

FORMAT_VERSION = 1  # of the documents, shards and manifest: another number, another fingerprint
MANIFEST_KEYS = {"format_version", "fingerprint", "corpus", "tokenizer", "splits", "yardsticks", "dtype"}
N_TOKENS_PER_CHUNK = 1 << 24
DTYPES = ("<u2", "<u4")
SHARD_NAME = r"(train|validation)-\d{5,}\.bin"


def prepare_dataset(spec: DataSpec, data_dir: Path, root: Path) -> Dataset:
    """The dataset that spec describes: opened when data_dir has it, else built first.

    root: what relative paths in spec are relative to. Processes that need the same dataset at once build it once: the
    others wait. A build that dies leaves nothing that is taken for a dataset. Raises DataError for a corpus, tokenizer
    or shard that is missing, empty, unfit or damaged.
    """
    corpus = read_corpus(spec, root)
    fingerprint = compute_fingerprint(spec, corpus, root)
    directory = data_dir / fingerprint
    if not directory.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        with _lock(data_dir / f"{fingerprint}.lock"):
            if not directory.exists():  # another process may have built it while this one waited
                _build_beside(spec, corpus, directory, root)
    manifest = _read_manifest(directory)
    # The same text under another name has the same shards: the name is what was asked for here.
    manifest["corpus"]["names"] = list(spec.corpus)
    return open_dataset(manifest, data_dir)


def open_dataset(manifest: Mapping[str, Any], data_dir: Path) -> Dataset:
    """The dataset that a manifest (a run's data.json) names, from its shards under data_dir.

    Raises DataError naming the file when a shard is missing, truncated, changed, or of another build than the manifest.
    """
    if set(manifest) != MANIFEST_KEYS or manifest["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"A data manifest must have format_version {FORMAT_VERSION} and the keys {sorted(MANIFEST_KEYS)}, but got "
            f"{manifest.get('format_version')} and {sorted(manifest)}; prepare the dataset anew"
        )
    fingerprint = manifest["fingerprint"]
    if not re.fullmatch(r"[0-9a-f]{64}", fingerprint):
        raise DataError(f"A fingerprint must be 64 hexadecimal digits, but the manifest has {fingerprint!r}")
    directory = data_dir / fingerprint
    if not directory.is_dir():
        raise DataError(
            f"The shards with the fingerprint {fingerprint} must lie under data_dir={data_dir}, but there is no such "
            f"folder, and {', '.join(manifest['corpus']['names'])} as it is now does not give them; bring back the "
            f"text with the SHA-256 {manifest['corpus']['sha256']}, or the folder"
        )
    _check_names(manifest)
    check_shards(directory, manifest)
    tokenizer = for_text(read_tokenizer(directory / "tokenizer.json"))
    return Dataset(dict(manifest), directory, tokenizer)


def _check_names(manifest: Mapping[str, Any]) -> None:
    """Raise DataError unless the manifest, which may be another's, names files and numbers as a build does."""
    if manifest["dtype"] not in DTYPES:
        raise DataError(
            f"Tokens must be stored as one of {', '.join(DTYPES)}, but the manifest has {manifest['dtype']!r}"
        )
    for split, described in manifest["splits"].items():
        for shard in described["shards"]:
            if not re.fullmatch(SHARD_NAME, str(shard["file"])):
                raise DataError(f"Shards must be called train-00000.bin, ..., but {split} has {shard['file']!r}")


def compute_fingerprint(spec: DataSpec, corpus: Corpus, root: Path) -> str:
    """64 hexadecimal digits that stand for what the dataset is made from.

    The version of the `tokenizers` library is left out: should another one train other merges, the SHA-256s of the
    tokenizer and of the shards in a run's manifest tell.
    """
    identity = {
        "format_version": FORMAT_VERSION,
        "corpus_sha256": corpus.sha256,
        "tokenizer": tokenizer_identity(spec, root),
        "validation_fraction": spec.validation_fraction,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def build_dataset(
    spec: DataSpec,
    corpus: Corpus,
    directory: Path,
    root: Path,
    fingerprint: str,
    n_tokens_per_shard: int = N_TOKENS_PER_SHARD,
) -> dict[str, Any]:
    """Write tokenizer, shards and manifest into an empty folder and have them on the disk. Returns the manifest."""
    tokenizer = build_tokenizer(spec, root, corpus.train, corpus.validation)
    check_lossless(tokenizer, corpus.validation)
    write_synced(directory / "tokenizer.json", tokenizer.to_str())
    vocab_size = vocabulary_size(tokenizer)
    dtype = DTYPES[vocab_size > 1 << 16]
    texts = {"train": corpus.train, "validation": corpus.validation}
    splits = {
        split: _write_split(directory, split, documents, tokenizer, dtype, n_tokens_per_shard)
        for split, documents in texts.items()
    }
    train, validation = (TokenStream(directory, splits[split]["shards"], dtype) for split in texts)
    yardsticks = compute_yardsticks(
        train.chunks(N_TOKENS_PER_CHUNK),
        validation.read(0, len(validation)),
        "".join(corpus.validation).encode(),
        vocab_size,
    )
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "corpus": {
            "names": list(spec.corpus),
            "n_documents": corpus.n_documents,
            "n_bytes": sum(split["n_bytes"] for split in splits.values()),
            "sha256": corpus.sha256,
        },
        "tokenizer": {
            "kind": tokenizer_identity(spec, root)["kind"],
            "vocab_size": vocab_size,
            "sha256": file_sha256(directory / "tokenizer.json"),
            "bos_id": tokenizer.token_to_id(BOS_TOKEN),
        },
        "splits": splits,
        "yardsticks": yardsticks,
        "dtype": dtype,
    }
    write_synced(directory / "manifest.json", json.dumps(manifest, indent=2))
    _sync_folder(directory)
    return manifest


def _build_beside(spec: DataSpec, corpus: Corpus, directory: Path, root: Path) -> None:
    """Build beside and rename, so that `directory` is there whole or not at all. The caller holds the lock."""
    started = time.perf_counter()
    log.info("building the dataset %s", directory)
    temporary = directory.with_name(f"{directory.name}.building")
    shutil.rmtree(temporary, ignore_errors=True)  # what a build that died left: nobody else can be in it
    temporary.mkdir()
    try:
        build_dataset(spec, corpus, temporary, root, fingerprint=directory.name)
        temporary.rename(directory)
        _sync_folder(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("built the dataset in %.1f s", time.perf_counter() - started)


def _write_split(
    directory: Path, split: str, documents: Sequence[str], tokenizer: Tokenizer, dtype: str, n_tokens_per_shard: int
) -> dict[str, Any]:
    writer = ShardWriter(directory, split, dtype, n_tokens_per_shard)
    for tokens in encode_documents(tokenizer, documents):
        writer.write(tokens)
    writer.close()
    entry = {
        "n_documents": len(documents),
        "n_bytes": sum(len(document.encode()) for document in documents),
        "n_tokens": sum(shard["n_tokens"] for shard in writer.shards),
        "sha256": text_sha256(documents),
        "shards": writer.shards,
    }
    log.info("%s: %d documents, %d bytes, %d tokens", split, entry["n_documents"], entry["n_bytes"], entry["n_tokens"])
    return entry


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(
            f"{path} must be the manifest of a finished dataset, but got {error}; delete the folder {directory} and "
            f"start the run again: it is rebuilt from the corpus"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("fingerprint") != directory.name:
        raise DataError(
            f"{path} must be a manifest with its folder's name as fingerprint; delete the folder {directory}"
        )
    return manifest


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that the kernel frees when this process ends, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process builds this dataset; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync_folder(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

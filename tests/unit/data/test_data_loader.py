"""Batches: pure in the step, each row once per epoch, each validation token once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydra.data import IGNORE_INDEX, Batch, Dataset, DataSpec, open_dataset, prepare_dataset
from hydra.data.build import build_dataset
from hydra.data.corpora import read_corpus
from hydra.data.loader import epoch_order
from hydra.data.shards import TokenStream
from hydra.errors import DataError


def make_spec(**fields: Any) -> DataSpec:
    """The default corpus and BPE, but for `fields`."""
    usual = {"corpus": ("default",), "tokenizer": "bpe", "vocab_size": 4096, "validation_fraction": 0.02}
    return DataSpec(**{**usual, **fields})


def stream_of(dataset: Dataset, split: str) -> np.ndarray:
    stream = TokenStream(dataset.directory, dataset.manifest["splits"][split]["shards"], dataset.manifest["dtype"])
    return stream.read(0, len(stream))


def assert_same(left: Batch, right: Batch) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype == np.int64
        np.testing.assert_array_equal(a, b)


def test_each_row_comes_exactly_once_per_epoch(dataset: Dataset) -> None:
    n_tokens, n_rows = 37, 5
    tokens = stream_of(dataset, "train")
    rows_per_epoch = dataset.n_train_rows(n_tokens)
    assert rows_per_epoch == (len(tokens) - 1) // n_tokens and rows_per_epoch % n_rows, (
        "an epoch must end within a batch"
    )
    expected = sorted(tuple(tokens[i * n_tokens : (i + 1) * n_tokens + 1]) for i in range(rows_per_epoch))
    n_steps = -(-3 * rows_per_epoch // n_rows)
    rows: list[tuple[int, ...]] = []
    for step in range(n_steps):
        batch = dataset.train_batch(step, seed=0, n_rows=n_rows, n_tokens=n_tokens)
        rows += [(*inputs, targets[-1]) for inputs, targets in zip(batch.inputs_BT, batch.targets_BT, strict=True)]
    epochs = [rows[e * rows_per_epoch : (e + 1) * rows_per_epoch] for e in range(3)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batch_depends_on_seed_and_step_alone(dataset: Dataset) -> None:
    in_order = [dataset.train_batch(step, seed=3, n_rows=7, n_tokens=29) for step in range(150)]
    fresh = open_dataset(dataset.manifest, dataset.directory.parent)
    for step in [149, 0, 75, 1, 148]:  # backwards, over epoch borders, in an object that served nothing before
        assert_same(fresh.train_batch(step, seed=3, n_rows=7, n_tokens=29), in_order[step])
    other = dataset.train_batch(0, seed=4, n_rows=7, n_tokens=29)
    assert not np.array_equal(other.inputs_BT, in_order[0].inputs_BT)


def test_epoch_order_is_fixed_for_all_time() -> None:
    assert epoch_order(seed=0, epoch=0, n_rows=8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert epoch_order(seed=2**64 - 1, epoch=3, n_rows=8).tolist() == [3, 2, 0, 1, 6, 5, 4, 7]


def test_slices_are_the_global_batch(dataset: Dataset) -> None:
    batch = dataset.train_batch(2, seed=0, n_rows=6, n_tokens=16)
    parts = [batch.slice_rows(start, start + 2) for start in (0, 2, 4)]
    assert_same(Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True))), batch)
    assert sum(part.n_valid_tokens for part in parts) == batch.n_valid_tokens == 6 * 16


def test_targets_follow_inputs_and_documents_are_counted_per_row(dataset: Dataset) -> None:
    bos_id = dataset.manifest["tokenizer"]["bos_id"]
    n_borders = 0
    for step in range(3):
        batch = dataset.train_batch(step, seed=0, n_rows=8, n_tokens=1024)
        np.testing.assert_array_equal(batch.inputs_BT[:, 1:], batch.targets_BT[:, :-1])
        for inputs, documents in zip(batch.inputs_BT, batch.document_ids_BT, strict=True):
            document = 0
            for t, token in enumerate(inputs):
                document += int(token == bos_id and t > 0)
                assert documents[t] == document
            n_borders += document
        # The end of a document is predicted: a target may be the next document's first token.
        assert np.count_nonzero(batch.targets_BT == bos_id) >= np.count_nonzero(batch.inputs_BT[:, 1:] == bos_id)
    assert n_borders > 0


@pytest.mark.parametrize(("n_rows", "n_tokens"), [(1, 7), (4, 64), (3, 100_000)])
def test_each_validation_token_but_the_first_is_predicted_once(dataset: Dataset, n_rows: int, n_tokens: int) -> None:
    tokens = stream_of(dataset, "validation")
    batches = list(dataset.validation_batches(n_rows=n_rows, n_tokens=n_tokens))
    assert {batch.inputs_BT.shape for batch in batches} == {(n_rows, n_tokens)}
    inputs = np.concatenate([batch.inputs_BT.ravel() for batch in batches])
    targets = np.concatenate([batch.targets_BT.ravel() for batch in batches])
    valid = targets != IGNORE_INDEX
    np.testing.assert_array_equal(targets[valid], tokens[1:])
    np.testing.assert_array_equal(inputs[valid], tokens[:-1])
    assert valid[: len(tokens) - 1].all(), "padding must come last"
    assert sum(batch.n_valid_tokens for batch in batches) == len(tokens) - 1
    assert len(batches) == -(-(len(tokens) - 1) // (n_rows * n_tokens))


def test_document_ids_in_a_row_that_starts_with_a_document(dataset: Dataset) -> None:
    first = next(dataset.validation_batches(n_rows=1, n_tokens=16))
    assert first.inputs_BT[0, 0] == dataset.manifest["tokenizer"]["bos_id"]
    assert first.document_ids_BT[0, 0] == 0


def test_documents_start_with_bos_and_hold_the_text(dataset: Dataset, spec: DataSpec, tmp_path: Path) -> None:
    corpus = read_corpus(spec, tmp_path)
    for split, texts in {"train": corpus.train, "validation": corpus.validation}.items():
        tokens = stream_of(dataset, split)
        bos_id = dataset.manifest["tokenizer"]["bos_id"]
        documents = np.split(tokens, np.flatnonzero(tokens == bos_id))[1:]
        assert [dataset.tokenizer.decode(document[1:].tolist()) for document in documents] == texts


def test_shard_size_does_not_change_batches(dataset: Dataset, spec: DataSpec, tmp_path: Path) -> None:
    directory = tmp_path / "small_shards" / dataset.manifest["fingerprint"]
    directory.mkdir(parents=True)
    corpus = read_corpus(spec, tmp_path)
    manifest = build_dataset(spec, corpus, directory, tmp_path, directory.name, n_tokens_per_shard=1000)
    assert len(manifest["splits"]["train"]["shards"]) > 10
    small = open_dataset(manifest, directory.parent)
    for step in (0, 9):
        shape = {"seed": 5, "n_rows": 9, "n_tokens": 300}
        assert_same(small.train_batch(step, **shape), dataset.train_batch(step, **shape))


def test_split_shorter_than_a_row_is_refused(dataset: Dataset) -> None:
    n_tokens = dataset.manifest["splits"]["train"]["n_tokens"]
    dataset.train_batch(0, seed=0, n_rows=2, n_tokens=n_tokens - 1)
    with pytest.raises(DataError, match=rf"must hold at least one row, {n_tokens + 1} tokens"):
        dataset.train_batch(0, seed=0, n_rows=2, n_tokens=n_tokens)


def test_smallest_possible_corpus(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("y")
    dataset = prepare_dataset(make_spec(corpus=("a", "b"), tokenizer="characters"), tmp_path / "data", tmp_path)
    (batch,) = dataset.validation_batches(n_rows=2, n_tokens=4)
    assert batch.n_valid_tokens == 1
    assert dataset.train_batch(10, seed=0, n_rows=3, n_tokens=1).n_valid_tokens == 3

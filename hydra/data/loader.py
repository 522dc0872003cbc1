"""Batches from shards: pure functions of (manifest, seed, step), so a resumed run and every rank see the same ones.

B rows of the global batch, T tokens of a row.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from hydra.data.shards import TokenStream
from hydra.errors import DataError

IGNORE_INDEX = -100  # torch's default ignore_index of cross entropy


class Batch(NamedTuple):
    """Rows of consecutive tokens. Micro-batches and ranks take slices of rows."""

    inputs_BT: np.ndarray
    """int64 [B, T]"""

    targets_BT: np.ndarray
    """int64 [B, T]: the token that follows, the next document's BOS_TOKEN too; IGNORE_INDEX where there is none."""

    document_ids_BT: np.ndarray
    """int64 [B, T]: which document of its row an input belongs to, counted from 0."""

    @property
    def n_valid_tokens(self) -> int:
        """Number of tokens to be predicted."""
        return int(np.count_nonzero(self.targets_BT != IGNORE_INDEX))

    def slice_rows(self, start: int, stop: int) -> "Batch":
        """Rows start to stop - 1 (views, not copies)."""
        return Batch(self.inputs_BT[start:stop], self.targets_BT[start:stop], self.document_ids_BT[start:stop])


class Dataset:
    """An opened dataset: `hydra.data.prepare_dataset` or `open_dataset` make it, after every shard was checked."""

    def __init__(self, manifest: dict[str, Any], directory: Path, tokenizer: Tokenizer) -> None:
        """manifest: as in directory/manifest.json. tokenizer: encodes a literal "<|endoftext|>" as text."""
        self.manifest = manifest
        self.directory = directory
        self.tokenizer = tokenizer
        self._bos_id = int(manifest["tokenizer"]["bos_id"])
        self._train = self._open_split("train")
        self._validation = self._open_split("validation")
        self._permutation_key: tuple[int, int, int] | None = None
        self._permutation = np.empty(0, dtype=np.int64)

    def n_train_rows(self, n_tokens: int) -> int:
        """Rows of n_tokens targets in one epoch. Raises DataError when there is not one."""
        n_rows = (len(self._train) - 1) // n_tokens
        if n_rows < 1:
            raise DataError(
                f"the text to train on must hold at least one row, {n_tokens + 1} tokens, but got {len(self._train)}; "
                "use a shorter context_length or a larger corpus"
            )
        return n_rows

    def train_batch(self, step: int, *, seed: int, n_rows: int, n_tokens: int) -> Batch:
        """The global batch of optimizer step `step` >= 0: n_rows rows of n_tokens.

        Row i of the train stream is its tokens i T to i T + T (one more than T: inputs and targets overlap), so each
        token but the first is a target once per epoch; up to T - 1 tokens at the end are not used. Every epoch
        goes through all rows in an order drawn from (seed, epoch); batches run on over the end of an epoch.
        """
        rows_B1 = np.empty((n_rows, n_tokens + 1), dtype=np.int64)
        for b, row in enumerate(self.train_rows(step, seed=seed, n_rows=n_rows, n_tokens=n_tokens)):
            rows_B1[b] = self._train.read(row * n_tokens, (row + 1) * n_tokens + 1)
        return self._batch(rows_B1[:, :-1].copy(), rows_B1[:, 1:].copy())

    def train_rows(self, step: int, *, seed: int, n_rows: int, n_tokens: int) -> list[int]:
        """Which rows of the train stream the global batch of step `step` >= 0 is made of, in its order."""
        assert min(step, n_rows - 1, n_tokens - 1) >= 0, (step, n_rows, n_tokens)
        rows_per_epoch = self.n_train_rows(n_tokens)
        places = (divmod(step * n_rows + b, rows_per_epoch) for b in range(n_rows))
        return [int(self._epoch_order(seed, epoch, rows_per_epoch)[position]) for epoch, position in places]

    def validation_batches(self, *, n_rows: int, n_tokens: int) -> Iterator[Batch]:
        """All validation tokens in order, each but the first a target exactly once.

        Every batch is [n_rows, n_tokens], so that compiled code sees one shape; after the last token targets are
        IGNORE_INDEX and inputs BOS_TOKEN.
        """
        n_targets = len(self._validation) - 1
        tokens_per_batch = n_rows * n_tokens
        for start in range(0, n_targets, tokens_per_batch):
            tokens = self._validation.read(start, min(start + tokens_per_batch, n_targets) + 1)
            inputs = np.full(tokens_per_batch, self._bos_id, dtype=np.int64)
            targets = np.full(tokens_per_batch, IGNORE_INDEX, dtype=np.int64)
            inputs[: len(tokens) - 1] = tokens[:-1]
            targets[: len(tokens) - 1] = tokens[1:]
            yield self._batch(inputs.reshape(n_rows, n_tokens), targets.reshape(n_rows, n_tokens))

    def _open_split(self, split: str) -> TokenStream:
        return TokenStream(self.directory, self.manifest["splits"][split]["shards"], self.manifest["dtype"])

    def _batch(self, inputs_BT: np.ndarray, targets_BT: np.ndarray) -> Batch:
        n_started_BT = np.cumsum(inputs_BT == self._bos_id, axis=1, dtype=np.int64)
        # A row that starts within a document counts that one as 0, and so does a row that starts with BOS_TOKEN.
        return Batch(inputs_BT, targets_BT, n_started_BT - n_started_BT[:, :1])

    def _epoch_order(self, seed: int, epoch: int, n_rows: int) -> np.ndarray:
        key = (seed, epoch, n_rows)
        if key != self._permutation_key:  # kept only because it is needed again: the value depends on the key alone
            self._permutation, self._permutation_key = epoch_order(seed, epoch, n_rows), key
        return self._permutation


def epoch_order(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    """A permutation of range(n_rows), int64 [n_rows], drawn from (seed, epoch); 0 <= seed < 2**64.

    Sorted raw Philox output (Salmon et al. 2011), because numpy promises that stream for all its versions and does not
    promise that of Generator.permutation.
    """
    philox = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    return np.argsort(philox.random_raw(n_rows), kind="stable")

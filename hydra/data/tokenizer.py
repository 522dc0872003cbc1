"""Tokenizers: made from a DataSpec, and set up so that text is only ever text and every text comes back unchanged."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from hydra.data.spec import BOS_TOKEN, TOKENIZER_KINDS, DataSpec
from hydra.errors import DataError

log = logging.getLogger(__name__)

UNKNOWN_CHARACTER = "<unk>"  # what "characters" makes of a character that the corpus does not hold, as in a prompt
N_DOCUMENTS_PER_CALL = 256


def tokenizer_identity(spec: DataSpec, root: Path) -> dict[str, str | int]:
    """What, beside the corpus, decides the tokenizer: the part of the dataset's fingerprint that is about it."""
    if spec.tokenizer == "bpe":
        return {"kind": "bpe", "vocab_size": spec.vocab_size}
    if spec.tokenizer in TOKENIZER_KINDS:
        return {"kind": spec.tokenizer}
    return {"kind": "file", "sha256": hashlib.sha256(_tokenizer_path(spec, root).read_bytes()).hexdigest()}


def build_tokenizer(spec: DataSpec, root: Path, train: Sequence[str], validation: Sequence[str]) -> Tokenizer:
    """The tokenizer that the spec names, with BOS_TOKEN in its vocabulary; from the same text always the same bytes."""
    if spec.tokenizer == "bpe":
        tokenizer = _train_bpe(train, spec.vocab_size)
    elif spec.tokenizer == "bytes":
        tokenizer = _byte_level(
            models.BPE(vocab={c: b for b, c in enumerate(_byte_alphabet())}, merges=[]), use_regex=False
        )
    elif spec.tokenizer == "characters":
        characters = sorted(set().union(*train, *validation))
        vocab = {entry: i for i, entry in enumerate([*characters, UNKNOWN_CHARACTER])}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN_CHARACTER))
        tokenizer.decoder = decoders.Fuse()
    else:
        tokenizer = read_tokenizer(_tokenizer_path(spec, root))
    tokenizer.add_special_tokens([AddedToken(BOS_TOKEN, special=True, normalized=False)])
    log.info("tokenizer %s: %d entries", spec.tokenizer, vocabulary_size(tokenizer))
    return for_text(tokenizer)


def for_text(tokenizer: Tokenizer) -> Tokenizer:
    """Set the tokenizer so that a text that holds "<|endoftext|>" literally is encoded as those characters.

    tokenizer.json does not store this setting, so it is made anew whenever a dataset is opened. (The one that
    `Run.load_tokenizer` reads for sampling keeps the library's setting: in a prompt the token may be written.)
    """
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id: ids of a foreign tokenizer may have holes."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> Iterator[np.ndarray]:
    """For each document: int64 [1 + its number of tokens], BOS_TOKEN's id first."""
    bos_id = tokenizer.token_to_id(BOS_TOKEN)
    with parallel_tokenizing():
        for start in range(0, len(documents), N_DOCUMENTS_PER_CALL):
            # add_special_tokens=False: a foreign tokenizer's post-processor would add its own marks to every document.
            encodings = tokenizer.encode_batch_fast(
                list(documents[start : start + N_DOCUMENTS_PER_CALL]), add_special_tokens=False
            )
            for encoding in encodings:
                yield np.array([bos_id, *encoding.ids], dtype=np.int64)


def check_lossless(tokenizer: Tokenizer, documents: Sequence[str]) -> None:
    """Raise DataError unless decoding gives each document back: bits per byte of other text would mean nothing."""
    bos_id = tokenizer.token_to_id(BOS_TOKEN)
    for document, ids in zip(documents, encode_documents(tokenizer, documents), strict=True):
        if bos_id in ids[1:]:
            raise DataError(
                f"A tokenizer must keep {BOS_TOKEN} for the start of documents, but this one makes it of text; take it "
                f"out of the merges and the vocabulary of its tokenizer.json"
            )
        decoded = tokenizer.decode(ids[1:].tolist(), skip_special_tokens=False)
        if decoded == document:
            continue
        pairs = zip([*decoded, ""], [*document, ""], strict=False)
        at = next(i for i, (got, wanted) in enumerate(pairs) if got != wanted)
        raise DataError(
            f"A tokenizer must give every text back unchanged (else bits per byte mean nothing), but this one turned "
            f"{document[at : at + 20]!r} into {decoded[at : at + 20]!r}; use a tokenizer without a normalizer that "
            f'changes text and with a decoder that undoes its pre-tokenizer, or tokenizer="bpe"'
        )


@contextlib.contextmanager
def parallel_tokenizing() -> Iterator[None]:
    """Let `tokenizers` use all cores inside, and none afterwards unless the user said otherwise.

    Its thread pool does not survive a fork: a child that used it would hang, and the library warns at every later fork
    unless its variable is set. "false" afterwards means neither can happen.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        os.environ[name] = before if before is not None else "false"


def _train_bpe(train: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over the pieces of GPT-2's pattern (Radford et al. 2019, section 2.2)."""
    tokenizer = _byte_level(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[BOS_TOKEN],
        initial_alphabet=_byte_alphabet(),
        show_progress=False,
    )
    with parallel_tokenizing():
        tokenizer.train_from_iterator(train, trainer, length=len(train))
    return tokenizer


def _byte_level(model: models.Model, use_regex: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_alphabet() -> list[str]:
    """The characters by which `tokenizers` writes the bytes 0 to 255: printable ones themselves, then the rest."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {ord(character): character for character in alphabet if ord(character) < 256}
    others = iter([character for character in alphabet if ord(character) >= 256])
    return [own[byte] if byte in own else next(others) for byte in range(256)]


def _tokenizer_path(spec: DataSpec, root: Path) -> Path:
    return root / Path(spec.tokenizer).expanduser()


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in the file; DataError when it is none, or not one that encodes a text always alike."""
    try:
        text = path.read_text(encoding="utf-8")
        settings: Any = json.loads(text)
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises plain Exception for a file that it cannot read
        raise DataError(
            f"tokenizer must be a tokenizer.json of the `tokenizers` library, but {path} is not: {error}"
        ) from error
    if settings["model"].get("dropout"):
        raise DataError(
            f"A tokenizer must encode a text always alike, but {path} has dropout={settings['model']['dropout']}; "
            f"set it to null in the file"
        )
    return tokenizer

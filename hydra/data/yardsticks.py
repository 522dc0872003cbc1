"""What simple models and compressors reach on the validation text, in bits per byte: the marks to hold a model against.

Counted as val_bits_per_byte is: bits of every validation token but the first, over the validation text's utf-8 bytes.
"""

import gzip
import logging
import lzma
from collections.abc import Iterable

import numpy as np

log = logging.getLogger(__name__)


def compute_yardsticks(
    train_chunks: Iterable[np.ndarray], validation: np.ndarray, validation_text: bytes, vocab_size: int
) -> dict[str, float]:
    """Bits per byte of four yardsticks.

    train_chunks: integers [any], the train stream in order. validation: integers [n], the whole validation stream.
    """
    counts_V, pairs, n_pairs = count_tokens_and_pairs(train_chunks, vocab_size)
    unigram_bits, bigram_bits = bits_of_tokens(counts_V, pairs, n_pairs, validation)
    n_bytes = len(validation_text)
    yardsticks = {
        "unigram_bits_per_byte": unigram_bits / n_bytes,
        "bigram_bits_per_byte": bigram_bits / n_bytes,
        "gzip_9_bits_per_byte": 8 * len(gzip.compress(validation_text, compresslevel=9, mtime=0)) / n_bytes,
        "xz_9_bits_per_byte": 8 * len(lzma.compress(validation_text, preset=9)) / n_bytes,
    }
    log.info("yardsticks: %s", ", ".join(f"{name} {value:.3f}" for name, value in yardsticks.items()))
    return yardsticks


def count_tokens_and_pairs(chunks: Iterable[np.ndarray], vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """counts_V int64 [V]; the distinct neighbours (first * V + second), int64, ascending; how often each occurs."""
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    pairs = np.empty(0, dtype=np.int64)
    n_pairs = np.empty(0, dtype=np.int64)
    last = np.empty(
        0, dtype=np.int64
    )  # the last token of the chunk before: its pair with the next chunk's first counts too
    for chunk in chunks:
        counts_V += np.bincount(chunk, minlength=vocab_size)
        tokens = np.concatenate([last, chunk.astype(np.int64)])
        last = tokens[-1:]
        new_pairs, n_new = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
        merged, where = np.unique(np.concatenate([pairs, new_pairs]), return_inverse=True)
        summed = np.zeros(len(merged), dtype=np.int64)
        np.add.at(summed, where, np.concatenate([n_pairs, n_new]))
        pairs, n_pairs = merged, summed
    return counts_V, pairs, n_pairs


def bits_of_tokens(
    counts_V: np.ndarray, pairs: np.ndarray, n_pairs: np.ndarray, tokens: np.ndarray
) -> tuple[float, float]:
    """Bits that the unigram and the bigram model spend on all tokens but the first, given those before.

    Unigram: add-one. Bigram: interpolated Witten-Bell (Chen and Goodman 1998, section 2.5):
    p(w|h) = (c(h, w) + d(h) p(w)) / (c(h) + d(h)), where d(h) is the number of different tokens seen after h.
    """
    vocab_size = len(counts_V)
    unigram_V = (counts_V + 1) / (counts_V.sum() + vocab_size)
    first_of_pair = pairs // vocab_size
    n_followers_V = np.bincount(first_of_pair, minlength=vocab_size)
    n_followed_V = np.zeros(vocab_size, dtype=np.int64)
    np.add.at(n_followed_V, first_of_pair, n_pairs)

    before, after = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
    wanted = before * vocab_size + after
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    n_seen = np.where(pairs[at] == wanted, n_pairs[at], 0)
    followers, followed = n_followers_V[before], n_followed_V[before]
    interpolated = (n_seen + followers * unigram_V[after]) / np.maximum(followed + followers, 1)
    bigram = np.where(followed > 0, interpolated, unigram_V[after])
    return float(-np.log2(unigram_V[after]).sum()), float(-np.log2(bigram).sum())

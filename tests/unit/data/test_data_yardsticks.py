"""Yardsticks against the slow way of counting."""

import gzip
import itertools
import lzma
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from hydra.data.yardsticks import bits_of_tokens, compute_yardsticks, count_tokens_and_pairs


def naive_bits(train: list[int], validation: list[int], vocab_size: int) -> tuple[float, float]:
    counts = Counter(train)
    followers: dict[int, Counter[int]] = defaultdict(Counter)
    for before, after in itertools.pairwise(train):
        followers[before][after] += 1
    unigram_bits = bigram_bits = 0.0
    for before, after in itertools.pairwise(validation):
        unigram = (counts[after] + 1) / (len(train) + vocab_size)
        seen = followers[before]
        bigram = (seen[after] + len(seen) * unigram) / (seen.total() + len(seen)) if seen else unigram
        unigram_bits -= math.log2(unigram)
        bigram_bits -= math.log2(bigram)
    return unigram_bits, bigram_bits


@pytest.mark.parametrize("n_per_chunk", [1, 7, 500, 10_000])
def test_models_agree_with_dictionaries(n_per_chunk: int) -> None:
    rng = np.random.default_rng(1)
    vocab_size = 50
    train = (rng.integers(0, 45, 2000) * rng.random(2000)).astype(np.int64)  # tokens 45 to 49 are never trained on
    validation = np.concatenate([rng.integers(0, vocab_size, 300), [49, 49, 3]])
    chunks = (train[start : start + n_per_chunk] for start in range(0, len(train), n_per_chunk))
    found = bits_of_tokens(*count_tokens_and_pairs(chunks, vocab_size), validation)
    assert found == pytest.approx(naive_bits(train.tolist(), validation.tolist(), vocab_size), rel=1e-12)


def test_bigram_probabilities_sum_to_one() -> None:
    vocab_size = 20
    train = np.random.default_rng(2).integers(0, 15, 100)
    counted = count_tokens_and_pairs([train], vocab_size)
    for before in (3, 19):
        bits = [bits_of_tokens(*counted, np.array([before, after]))[1] for after in range(vocab_size)]
        assert sum(2.0**-b for b in bits) == pytest.approx(1.0)


def test_yardsticks_are_per_byte_of_the_validation_text() -> None:
    text = b"some text, some more text\n" * 40
    tokens = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
    yardsticks = compute_yardsticks([tokens], tokens, text, 256)
    unigram, bigram = naive_bits(tokens.tolist(), tokens.tolist(), 256)
    assert yardsticks == {
        "unigram_bits_per_byte": pytest.approx(unigram / len(text)),
        "bigram_bits_per_byte": pytest.approx(bigram / len(text)),
        "gzip_9_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz_9_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }

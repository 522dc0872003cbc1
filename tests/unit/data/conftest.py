"""Small corpora for the data tests."""

import random
from pathlib import Path

import pytest

from hydra.data import Dataset, DataSpec, prepare_dataset

WORDS = [
    *"()=:012é😀λ",
    "def",
    "return",
    "self",
    "for",
    "in",
    "range",
    "if",
    "class",
    "value",
    "index",
    "matrix",
    "naïve",
]


def small_text(seed: int, n_lines: int = 200) -> str:
    rng = random.Random(seed)
    return "".join(" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) + "\n" for _ in range(n_lines))


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    """Twenty different files, of some 5 kB each."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02d}.txt").write_text(small_text(seed=i), encoding="utf-8")
    return folder


@pytest.fixture
def spec(corpus_folder: Path) -> DataSpec:
    return DataSpec(corpus=(str(corpus_folder),), tokenizer="bpe", vocab_size=300, validation_fraction=0.1)


@pytest.fixture
def dataset(spec: DataSpec, tmp_path: Path) -> Dataset:
    return prepare_dataset(spec, tmp_path / "data", tmp_path)

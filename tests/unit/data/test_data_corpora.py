"""Corpora: what is read, how it is cut and split, and what is refused."""

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import pytest

from hydra.data import DataSpec, check_corpus
from hydra.data import corpora as corpora_module
from hydra.data.corpora import cut_at_line_ends, read_corpus, split_documents, text_sha256
from hydra.errors import ConfigError, DataError


def make_spec(**fields: Any) -> DataSpec:
    """The default corpus and BPE, but for `fields`."""
    usual = {"corpus": ("default",), "tokenizer": "bpe", "vocab_size": 4096, "validation_fraction": 0.02}
    return DataSpec(**{**usual, **fields})


def spec_of(*corpus: str, **fields: object) -> DataSpec:
    return make_spec(corpus=corpus, **fields)  # type: ignore[arg-type]


def test_default_corpus_is_the_pinned_source_without_tests() -> None:
    files = corpora_module._default_corpus_files()
    names = [file.as_posix() for file in files]
    assert not [name for name in names if "/tests/" in name or "/test_" in name or name.endswith("conftest.py")]
    assert all(name.endswith(".py") for name in names)
    assert len(files) == 1216
    # Raises when the bytes are not those of DEFAULT_CORPUS_SHA256.
    corpus = read_corpus(make_spec(), Path("/nowhere"))
    assert sum(len(text.encode()) for text in corpus.train + corpus.validation) == 22_590_090
    assert 300_000 < sum(len(text.encode()) for text in corpus.validation) < 600_000
    assert corpus.sha256 == "460588c9463184b24fe28d6ad7353df7f379e6ddbcfd2c680ae3816d6bf41f7d"


def test_default_corpus_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(corpora_module.DEFAULT_CORPUS_PACKAGES, "sympy", "1.13.0")
    with pytest.raises(DataError, match=r"sympy==1\.13\.0, but sympy==1\.14\.0 .*pip install .*sympy==1\.13\.0"):
        check_corpus(make_spec(), Path())


def test_default_corpus_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(DataError, match=r"no jinja2 is installed; run `pip install .*jinja2==3\.1\.6`"):
        check_corpus(make_spec(), Path())


def test_default_corpus_with_a_changed_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    changed = tmp_path / "changed.py"
    changed.write_text("x = 1\n")
    monkeypatch.setattr(corpora_module, "_default_corpus_files", lambda: [changed])
    with pytest.raises(DataError, match="a package was changed; run `pip install --force-reinstall"):
        read_corpus(make_spec(), Path())


def test_folder_is_read_in_order_without_hidden_blank_and_binary_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b" / "1.md").write_text("first\n")
    (folder / "a.txt").write_text("zeroth\r\n\ufeff", newline="")
    (folder / "z").write_text("last")
    (folder / ".hidden").write_text("no")
    (folder / ".git" / "config").write_text("no")
    (folder / "blank.txt").write_text(" \n")
    (folder / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    corpus = read_corpus(spec_of("texts", validation_fraction=0.01), tmp_path)
    assert sorted(corpus.train + corpus.validation) == ["first\n", "last", "zeroth\r\n\ufeff"]
    assert corpus.sha256 == text_sha256(["zeroth\r\n\ufeff", "first\n", "last"])
    assert "left out 1 files that are not utf-8" in caplog.text


def test_one_long_file_gives_both_splits(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(20_000))
    (tmp_path / "one.txt").write_text(text)
    corpus = read_corpus(spec_of("one.txt"), tmp_path)
    assert 60 <= corpus.n_documents <= 70
    n_validation = sum(map(len, corpus.validation))
    assert 0.02 * len(text) <= n_validation < 0.04 * len(text)
    assert all(document.endswith("\n") for document in corpus.train + corpus.validation)


def test_pieces_are_the_text_and_cut_no_character() -> None:
    text = ("é😀" * 50 + "\n" + "x" * 30 + "\r\n" + "λ" * 200).encode()
    for piece_bytes in (7, 64, 101):
        pieces = list(cut_at_line_ends(text, piece_bytes))
        assert b"".join(pieces) == text
        assert all(0 < len(piece) <= piece_bytes and piece.decode() for piece in pieces)


def test_split_is_by_text_alone() -> None:
    documents = [f"document {i}" for i in range(500)]
    train, validation = split_documents(documents, 0.1)
    assert len(train) + len(validation) == 500 and 45 <= len(validation) <= 55
    assert split_documents(documents[::-1], 0.1) == (train[::-1], validation[::-1])
    # A document more moves at most those whose hash lies at the border.
    _, grown = split_documents([*documents, "another"], 0.1)
    assert len(set(grown) ^ set(validation)) <= 2


def test_duplicates_stay_on_one_side() -> None:
    train, validation = split_documents([f"document {i % 10}" for i in range(100)], 0.3)
    assert train and validation and not set(train) & set(validation)
    assert len(train) + len(validation) == 100


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_neither_split_is_ever_empty(fraction: float) -> None:
    train, validation = split_documents(["a", "b"], fraction)
    assert sorted(train + validation) == ["a", "b"] and train and validation


def test_corpus_of_one_short_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short\n")
    (tmp_path / "same.txt").write_text("too short\n")
    for refuse in (check_corpus, read_corpus):
        with pytest.raises(DataError, match=r"at least two different documents.*got 2 of one text"):
            refuse(spec_of("short.txt", "same.txt"), tmp_path)


def test_missing_empty_and_unreadable_corpora_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "good.txt").write_text("text\n")
    with pytest.raises(DataError, match=r"existing file or folder, but got 'nowhere' .*relative ones start from"):
        check_corpus(spec_of("good.txt", "nowhere"), tmp_path)
    with pytest.raises(DataError, match=r"must hold text, but 'empty' .* give another path"):
        check_corpus(spec_of("empty"), tmp_path)
    with pytest.raises(DataError, match=r"must hold text, but 'empty\.txt'"):
        check_corpus(spec_of("empty.txt"), tmp_path)
    with pytest.raises(DataError, match=r"must be utf-8 text, but .*latin\.txt is not"):
        check_corpus(spec_of("latin.txt"), tmp_path)
    with pytest.raises(DataError, match=r"tokenizer must be one of bpe, bytes, characters or .* but got 'bppe'"):
        check_corpus(spec_of("good.txt", tokenizer="bppe"), tmp_path)


def test_a_file_that_ends_within_a_character_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "cut.txt").write_bytes(b"good\n" * 50_000 + "é".encode()[:1])
    with pytest.raises(DataError, match=r"must be utf-8 text, but .*cut\.txt"):
        read_corpus(spec_of("cut.txt"), tmp_path)


def test_a_pipe_is_told_from_a_path_that_is_not_there(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"must be a file or folder, but .*pipe is neither .*; save its text to a file"):
        check_corpus(spec_of("pipe"), tmp_path)
    with pytest.raises(DataError, match=r"there is no .*nothing"):
        check_corpus(spec_of("nothing"), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"corpus": ()}, "corpus must be a tuple of at least one"),
        ({"corpus": "default"}, "corpus must be a tuple"),
        ({"vocab_size": 256}, "vocab_size must be at least 257"),
        ({"validation_fraction": 0.0}, "validation_fraction must lie between 0 and 1, but got 0.0"),
        ({"validation_fraction": float("nan")}, "validation_fraction must lie between"),
        ({"tokenizer": ""}, "tokenizer must be one of"),
    ],
)
def test_values_that_no_machine_can_use_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_spec(**fields)  # type: ignore[arg-type]

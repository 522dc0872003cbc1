"""Tokenizers: every text comes back, no text becomes the special token, training is deterministic."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from hydra.data import BOS_TOKEN, DataSpec
from hydra.data.tokenizer import (
    UNKNOWN_CHARACTER,
    build_tokenizer,
    check_lossless,
    encode_documents,
    for_text,
    tokenizer_identity,
    vocabulary_size,
)
from hydra.errors import DataError


def make_spec(**fields: Any) -> DataSpec:
    """The default corpus and BPE, but for `fields`."""
    usual = {"corpus": ("default",), "tokenizer": "bpe", "vocab_size": 4096, "validation_fraction": 0.02}
    return DataSpec(**{**usual, **fields})


ODD_TEXTS = {
    "emoji": "👩‍👩‍👧 😀é e\u0301",
    "line ends": "a\r\nb\rc\n\n\x0b\x0c\u2028d",
    "lone byte order mark": "\ufeff",
    "literal special token": f"see {BOS_TOKEN}{BOS_TOKEN} and <|endof text|>",
    "spaces": "  \t two  spaces ",
    "nul and noncharacters": "\x00\x7f\uffff\ufffd\U0010ffff",
    "single space": " ",
    "unknown mark": UNKNOWN_CHARACTER,
}
TRAIN = ["def f(x):\n    return x + 1\n" * 20, "for i in range(10):\n    print(i)\n" * 20]


def tokenizer_of(kind: str, folder: Path, texts: list[str]) -> Tokenizer:
    if kind == "file":
        foreign = build_tokenizer(make_spec(vocab_size=300), folder, TRAIN, texts)
        document = json.loads(foreign.to_str())
        document["added_tokens"] = []  # a tokenizer.json that does not know our special token
        del document["model"]["vocab"][BOS_TOKEN]
        document["model"]["vocab"] = {entry: i - 1 for entry, i in document["model"]["vocab"].items()}
        document["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        (folder / "tokenizer.json").write_text(json.dumps(document))
        kind = str(folder / "tokenizer.json")
    return build_tokenizer(make_spec(tokenizer=kind, vocab_size=300), folder, TRAIN, texts)


@pytest.mark.parametrize("kind", ["bpe", "bytes", "characters", "file"])
def test_odd_texts_come_back_and_never_hold_the_special_token(kind: str, tmp_path: Path) -> None:
    texts = list(ODD_TEXTS.values())
    tokenizer = tokenizer_of(kind, tmp_path, texts)
    bos_id = tokenizer.token_to_id(BOS_TOKEN)
    assert 0 <= bos_id < vocabulary_size(tokenizer)
    for text, ids in zip(texts, encode_documents(tokenizer, texts), strict=True):
        assert ids[0] == bos_id and bos_id not in ids[1:], text
        assert tokenizer.decode(ids[1:].tolist(), skip_special_tokens=False) == text
    check_lossless(tokenizer, texts)
    # The same must hold for the tokenizer as it is read back by open_dataset.
    again = for_text(Tokenizer.from_str(tokenizer.to_str()))
    assert [ids.tolist() for ids in encode_documents(again, texts)] == [
        ids.tolist() for ids in encode_documents(tokenizer, texts)
    ]


def test_bytes_are_their_own_ids(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bytes", tmp_path, [])
    text = "aé\x00😀\n"
    (ids,) = encode_documents(tokenizer, [text])
    assert ids.tolist() == [256, *text.encode()]
    assert vocabulary_size(tokenizer) == 257


def test_characters_are_those_of_both_splits(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(make_spec(tokenizer="characters"), tmp_path, ["ab"], ["bé"])
    assert vocabulary_size(tokenizer) == 3 + 2
    assert tokenizer.decode(tokenizer.encode("aΩé", add_special_tokens=False).ids) == f"a{UNKNOWN_CHARACTER}é"


def test_bpe_keeps_the_vocabulary_size_and_all_bytes(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(make_spec(vocab_size=270), tmp_path, TRAIN, [])
    assert vocabulary_size(tokenizer) == 270
    check_lossless(tokenizer, ["\u3042 was never trained on"])


def test_bpe_training_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    texts = [f"name_{i * 7919 % 1000} = {i}\n" for i in range(3000)]  # many ties between pairs
    first, second = (build_tokenizer(make_spec(vocab_size=600), tmp_path, texts, []).to_str() for _ in range(2))
    assert first == second


def test_lossy_tokenizer_is_refused(tmp_path: Path) -> None:
    lossy = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("abcdefgh ")}, merges=[]))
    lossy.normalizer = normalizers.Lowercase()
    lossy.pre_tokenizer = pre_tokenizers.Whitespace()
    lossy.save(str(tmp_path / "lossy.json"))
    tokenizer = build_tokenizer(make_spec(tokenizer="lossy.json"), tmp_path, [], [])
    with pytest.raises(DataError, match=r"must give every text back unchanged.*use a tokenizer without a normalizer"):
        check_lossless(tokenizer, ["abc", "aBc"])


def test_tokenizer_that_makes_the_special_token_of_text_is_refused(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel(vocab={BOS_TOKEN: 0, "?": 1}, unk_token="?")).save(str(tmp_path / "words.json"))
    tokenizer = build_tokenizer(make_spec(tokenizer="words.json"), tmp_path, [], [])
    with pytest.raises(DataError, match="but this one makes it of text"):
        check_lossless(tokenizer, [BOS_TOKEN])


def test_foreign_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match=r"must be a tokenizer\.json .*broken\.json is not"):
        build_tokenizer(make_spec(tokenizer="broken.json"), tmp_path, [], [])
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[], dropout=0.1)).save(str(tmp_path / "dropout.json"))
    with pytest.raises(DataError, match=r"must encode a text always alike.*dropout=0\.1"):
        build_tokenizer(make_spec(tokenizer="dropout.json"), tmp_path, [], [])


def test_identity_of_a_file_is_its_content(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text("1")
    before = tokenizer_identity(make_spec(tokenizer="t.json"), tmp_path)
    assert before == tokenizer_identity(make_spec(tokenizer=str(path)), Path("/nowhere"))
    path.write_text("2")
    assert before != tokenizer_identity(make_spec(tokenizer="t.json"), tmp_path)
    assert "vocab_size" not in tokenizer_identity(make_spec(tokenizer="bytes"), tmp_path)


def test_no_threads_are_left_for_a_fork_and_a_users_choice_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    tokenizer = tokenizer_of("bytes", tmp_path, [])
    list(encode_documents(tokenizer, ["a"]))
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    list(encode_documents(tokenizer, ["a"]))
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"

"""Secrets are found by name, masked in every spelling, and nothing else is touched."""

import base64
import html
import io
import json
import logging
import os
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from hydra.errors import ConfigError
from hydra.runtime import paths
from hydra.runtime.ledger import Ledger
from hydra.runtime.logs import logging_to
from hydra.runtime.records import MetricsWriter, append_record
from hydra.runtime.secrets import (
    MARKED,
    MASK,
    MaskedStream,
    is_secret,
    mark,
    mask,
    mask_texts,
    refuse_secrets,
    texts_in,
)
from scripts.config import TrainingConfig
from scripts.launch import write_config_once

SECRET = """q9-cAnary"'<&>\\é+/{x}%"""
CORE = "cAnary"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name, value in os.environ.items() if is_secret(name, value)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    monkeypatch.setenv(MARKED, "[]")


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "aws_secret_access_key", "MY_SECRETS", "PGPASSWORD", "X_KEY"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name, "abcdefgh")


@pytest.mark.parametrize(
    "name",
    ["GPG_KEY", "SSH_PUBLIC_KEY", "DB_PASSWORD_FILE", "SECRETS_DIR", "KEYBOARD", "TOKENIZERS_PARALLELISM", MARKED],
)
def test_names_that_look_like_it(name: str) -> None:
    assert not is_secret(name, "abcdefgh")


def test_a_path_of_a_key_is_no_secret(tmp_path: Path) -> None:
    assert not is_secret("SSH_KEY", str(tmp_path))
    assert is_secret("SSH_KEY", str(tmp_path / "gone"))


SPELLINGS = {
    "plain": SECRET,
    "JSON": json.dumps({"a": SECRET}),
    "JSON, unicode": json.dumps(SECRET, ensure_ascii=False),
    "JSON in JSON": json.dumps(json.dumps(SECRET)),
    "Python": repr([SECRET]),
    "Python in JSON": json.dumps(repr(SECRET)),
    "Python in Python": repr(repr(SECRET)),
    "HTML": html.escape(SECRET),
    "HTML, quotes kept": html.escape(SECRET, quote=False),
    "address": f"https://e.org/?key={quote(SECRET)}",
    "address, all of it": f"https://e.org/?key={quote(SECRET, safe='')}",
}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_every_spelling_is_masked(kind: str) -> None:
    assert CORE not in mask(f"before {SPELLINGS[kind]} behind")
    assert mask(f"before {SPELLINGS[kind]} behind").startswith("before ")
    assert mask(f"before {SPELLINGS[kind]} behind").endswith(" behind")


@pytest.mark.parametrize("before", ["", "a", "ab", "user:"])
@pytest.mark.parametrize("behind", ["", "a", "ab", "\n"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_base64_is_masked_wherever_it_begins(before: str, behind: str, encode: object) -> None:
    encoded = encode((before + SECRET + behind).encode()).decode()  # type: ignore[operator]
    masked = mask(encoded)
    assert MASK in masked
    left = masked.replace(MASK, "")
    assert len(left) <= len(base64.b64encode((before + behind).encode())) + 8


def test_what_is_short_or_nobodys_secret_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "7chars.")
    monkeypatch.setenv("HARMLESS", "unmasked value")
    text = "7chars. and unmasked value"
    assert mask(text) == text


def test_the_longer_of_two_secrets_goes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "abcdefgh")
    monkeypatch.setenv("B_KEY", "abcdefgh-and-more")
    assert mask("x abcdefgh-and-more y abcdefgh z") == f"x {MASK} y {MASK} z"


def test_lines_of_a_secret_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVATE_KEY", "-----BEGIN-----\nMIIEvQIBADAN\n-----END-----\n")
    assert mask("one\nMIIEvQIBADAN\ntwo") == f"one\n{MASK}\ntwo"


def test_names_in_mappings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORT_KEY", "started_at")
    assert mask_texts({"started_at": [1, "by started_at", None, True]}) == {"started_at": [1, f"by {MASK}", None, True]}


def test_marked_values_are_masked_in_children_too() -> None:
    mark(texts_in({"a": ["marked-value-1", 1234567890], "b": None, "c": "short"}))
    mark(["marked-value-2"])
    assert mask_texts({"pin": 1234567890, "other": 123456789, "steps": [12345678901]}) == {
        "pin": MASK,
        "other": 123456789,
        "steps": [12345678901],
    }
    assert mask("marked-value-1 marked-value-2 1234567890 None short") == f"{MASK} {MASK} {MASK} None short"
    assert set(json.loads(os.environ[MARKED])) >= {"marked-value-1", "marked-value-2"}


def test_a_stream_masks_what_comes_in_pieces() -> None:
    written = io.StringIO()
    stream = MaskedStream(written)
    stream.write("a line\nthen " + SECRET[:9])
    stream.flush()
    assert written.getvalue() == "a line\nthen "
    stream.write(SECRET[9:])
    stream.flush()
    stream.write(" and more")
    stream.flush()
    assert written.getvalue() == f"a line\nthen {MASK} and more"


def test_a_log_file_is_masked_with_its_tracebacks(tmp_path: Path) -> None:
    with logging_to(tmp_path / "trainer.log"):
        try:
            raise ValueError(SECRET)  # noqa: TRY301
        except ValueError:
            logging.getLogger("x").exception("failed with %s", SECRET)
    log = (tmp_path / "trainer.log").read_text()
    assert log.count(MASK) == 2
    assert CORE not in log


def test_records_events_and_ledger_are_masked(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, "disabled", "-")
    writer.write({"step": 1, f"loss of {SECRET}": 1.0})
    writer.close()
    append_record(tmp_path / "samples.jsonl", {"step": 1, "text": SECRET})
    ledger = Ledger.open(tmp_path)
    ledger.begin(1)
    ledger.finish("failed", stage="x", cause="error", message=repr(ValueError(SECRET)))
    ledger.close()
    paths.write_json(tmp_path / "environment.json", {"sessions": [{"platform": SECRET}]})
    (events,) = (tmp_path / "events").iterdir()
    assert MASK.encode() in events.read_bytes()
    for path in (events, *(tmp_path / name for name in ("samples.jsonl", "state.json", "environment.json"))):
        assert CORE.encode() not in path.read_bytes(), path


def test_a_config_with_a_secret_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = TrainingConfig.preset("tiny", sample_prompt=f"say {SECRET}")
    with pytest.raises(ConfigError, match="sample_prompt holds the value of SOME_API_KEY") as refused:
        write_config_once(config, tmp_path / "run")
    assert CORE not in str(refused.value)
    assert not (tmp_path / "run").exists()
    mark(["marked-value-3"])
    with pytest.raises(ConfigError, match="corpus holds the value of a parameter"):
        refuse_secrets({"corpus": ["x", "a/marked-value-3/b"]})


def test_standard_streams_stay_usable() -> None:
    stream = MaskedStream(sys.__stderr__)  # type: ignore[arg-type]
    assert stream.fileno() == 2
    assert stream.isatty() in (True, False)

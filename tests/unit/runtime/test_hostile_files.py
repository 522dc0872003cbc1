"""Whatever stands in the place of a run's files: nothing in it runs, and the refusal names the file."""

import hashlib
import pickle
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hydra.data import check_corpus, open_dataset
from hydra.errors import ConfigError, DataError, HydraError, RunError
from hydra.runtime import Run
from hydra.runtime.checkpoint import list_checkpoints, load_checkpoint
from hydra.runtime.paths import read_json
from hydra.testing.hostile.files import (
    GROUPS,
    OPENERS,
    PAYLOADS,
    READERS,
    Touch,
    copy_with_shards,
    put,
    shards_of,
)
from scripts import trainer
from scripts.config import TrainingConfig, refuse_changed_config
from scripts.trainer import Trainer


@pytest.fixture(scope="module")
def trained(make_run: Callable[..., Path]) -> Path:
    run_dir = make_run("trained", max_steps=2, checkpoint_every=1, eval_every=2, sample_tokens=0)
    Trainer(TrainingConfig.from_json((run_dir / "config.json").read_text()), run_dir).train()
    return run_dir


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return copy_with_shards(trained, tmp_path / "runs" / "theirs")


@pytest.fixture(params=PAYLOADS)
def payload(request: pytest.FixtureRequest, tmp_path: Path) -> bytes:
    return PAYLOADS[request.param](tmp_path / "sentinel")


@pytest.fixture(autouse=True)
def nothing_ran(request: pytest.FixtureRequest, tmp_path: Path) -> object:
    yield
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("kind", OPENERS)
def test_payloads_run_where_somebody_opens_them(tmp_path: Path, kind: str) -> None:
    """The control."""
    OPENERS[kind](PAYLOADS[kind](tmp_path / "sentinel"))
    (tmp_path / "sentinel").unlink()


@pytest.mark.parametrize(("pattern", "read"), READERS)
def test_a_file_of_a_run(run_dir: Path, payload: bytes, pattern: str, read: Callable[[Run], object]) -> None:
    path = put(run_dir, pattern, payload)
    with pytest.raises(HydraError, match=re.escape(path.name)):
        read(Run.open(run_dir))


@pytest.mark.parametrize("name", [*(f"{group}.safetensors" for group in GROUPS), "trainer_state.json"])
def test_a_checkpoint_that_a_trainer_would_go_on_from(run_dir: Path, payload: bytes, name: str) -> None:
    put(run_dir, f"checkpoints/*/{name}", payload)
    (run_dir / "state.json").unlink()
    config = TrainingConfig.from_json((run_dir / "config.json").read_text())
    with pytest.raises(HydraError, match=name):
        Trainer(config, run_dir).train()


def test_a_header_of_a_hundred_megabytes(run_dir: Path) -> None:
    header = b"{" + b" " * 100_000_000 + b"}"
    put(run_dir, "checkpoints/*/model.safetensors", struct.pack("<Q", len(header)) + header)
    with pytest.raises(HydraError, match=r"model\.safetensors"):
        load_checkpoint(list_checkpoints(run_dir)[-1], ("model",))


def test_a_tokenizer_of_a_config(run_dir: Path, payload: bytes, tmp_path: Path, corpus_dir: Path) -> None:
    path = put(run_dir, "tokenizer.json", payload)
    config = TrainingConfig.preset("tiny", corpus=str(corpus_dir), tokenizer=str(path))
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        check_corpus(config.data_spec(), tmp_path)


def test_a_tokenizer_that_its_manifest_knows(run_dir: Path, payload: bytes) -> None:
    manifest = read_json(run_dir / "data.json")
    put(run_dir, "shards/*/tokenizer.json", payload)
    manifest["tokenizer"]["sha256"] = hashlib.sha256(payload).hexdigest()
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        open_dataset(manifest, shards_of(run_dir))


def test_a_shard_that_its_manifest_knows_is_read_as_numbers(run_dir: Path, tmp_path: Path) -> None:
    payload = pickle.dumps(Touch(tmp_path / "sentinel")).ljust(4096, b"\0")
    manifest = read_json(run_dir / "data.json")
    put(run_dir, "shards/*/train-00000.bin", payload)
    known = {"n_bytes": 4096, "n_tokens": 2048, "sha256": hashlib.sha256(payload).hexdigest()}
    manifest["splits"]["train"]["shards"] = [{"file": "train-00000.bin", **known}]
    batch = open_dataset(manifest, shards_of(run_dir)).train_batch(0, seed=0, n_rows=2, n_tokens=32)
    assert batch.inputs_BT.dtype == np.int64


@pytest.mark.parametrize(
    ("dtype", "file"), [("O", "train-00000.bin"), ("<u2", "../../sentinel"), ("<u2", "/etc/passwd")]
)
def test_a_manifest_that_names_what_no_build_does(run_dir: Path, dtype: str, file: str) -> None:
    manifest = read_json(run_dir / "data.json")
    manifest["dtype"] = dtype
    manifest["splits"]["train"]["shards"][0]["file"] = file
    with pytest.raises(DataError, match=r"must be (stored as one of|called train)"):
        open_dataset(manifest, shards_of(run_dir))


def test_lines_of_metrics(run_dir: Path, payload: bytes) -> None:
    (run_dir / "metrics.jsonl").write_bytes(payload + b"\n[")
    if payload not in (b"", b"[1]"):
        with pytest.raises(RunError, match=r"metrics\.jsonl"):
            Run.open(run_dir).metrics()


def test_a_config(
    run_dir: Path, payload: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (run_dir / "config.json").write_bytes(payload)
    with pytest.raises((RunError, ConfigError), match=r"config\.json"):
        refuse_changed_config(TrainingConfig.preset("tiny"), run_dir)
    for name in ("stdout", "stderr"):  # a program of its own may replace them
        monkeypatch.setattr(sys, name, getattr(sys, name))
    assert trainer.main([str(run_dir)]) == trainer.EXIT_BAD_CONFIG
    assert "config.json" in caplog.text

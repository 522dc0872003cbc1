"""Whatever stands in the place of a run's files: nothing in it runs, and the refusal names the file."""

import hashlib
import io
import json
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from hydra.data import check_corpus, open_dataset
from hydra.errors import ConfigError, DataError, HydraError, RunError
from hydra.model.framework import build_model
from hydra.runtime import Run
from hydra.runtime.checkpoint import list_checkpoints, load_checkpoint
from hydra.runtime.paths import read_json
from scripts import trainer
from scripts.config import TrainingConfig, refuse_changed_config
from scripts.trainer import Trainer

GROUPS = ("model", "optimizer", "rng")


class Touch:
    """What unpickles to an open file, which then is there."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.sentinel), "w")


def torch_zip(sentinel: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": Touch(sentinel)}, buffer)
    return buffer.getvalue()


def numpy_objects(sentinel: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Touch(sentinel)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def overlapping(sentinel: Path) -> bytes:
    described = {"dtype": "F32", "shape": [2]}
    tensors = {"a": {**described, "data_offsets": [0, 8]}, "b": {**described, "data_offsets": [4, 12]}}
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + bytes(12)


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "pickle": lambda sentinel: pickle.dumps(Touch(sentinel)),
    "old pickle": lambda sentinel: pickle.dumps(Touch(sentinel), protocol=0),
    "torch zip": torch_zip,
    "DCP metadata": lambda sentinel: pickle.dumps({"state_dict_metadata": Touch(sentinel)}, protocol=4),
    "numpy objects": numpy_objects,
    "yaml tag": lambda sentinel: f"!!python/object/apply:builtins.open ['{sentinel}', w]".encode(),
    "overlapping tensors": overlapping,
    "header that is not there": lambda sentinel: struct.pack("<Q", 100_000_000) + b"{}",
    "header without end": lambda sentinel: struct.pack("<Q", 2**63) + b"{}",
    "deep JSON": lambda sentinel: b"[" * 200_000,
    "JSON list": lambda sentinel: b"[1]",
    "nothing": lambda sentinel: b"",
}
OPENERS = {
    "pickle": pickle.loads,
    "old pickle": pickle.loads,
    "torch zip": lambda data: torch.load(io.BytesIO(data), weights_only=False),
    "DCP metadata": pickle.loads,
    "numpy objects": lambda data: np.load(io.BytesIO(data), allow_pickle=True),
    "yaml tag": yaml.unsafe_load,
}


@pytest.fixture(scope="module")
def trained(make_run: Callable[..., Path]) -> Path:
    run_dir = make_run("trained", max_steps=2, checkpoint_every=1, eval_every=2, sample_tokens=0)
    Trainer(TrainingConfig.from_json((run_dir / "config.json").read_text()), run_dir).train()
    return run_dir


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs" / "theirs"))


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


def plant(path: Path, payload: bytes, manifest: Path) -> None:
    """Put the payload into a file of a checkpoint whose manifest says that this is right."""
    path.write_bytes(payload)
    described = json.loads(manifest.read_text())
    described["files"][path.name] = {"n_bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    manifest.write_text(json.dumps(described, indent=2) + "\n")


@pytest.mark.parametrize("name", [*(f"{group}.safetensors" for group in GROUPS), "trainer_state.json"])
def test_a_file_of_a_checkpoint(run_dir: Path, payload: bytes, name: str) -> None:
    checkpoint = list_checkpoints(run_dir)[-1]
    (checkpoint / ".metadata").write_bytes(payload)
    plant(checkpoint / name, payload, checkpoint / "manifest.json")
    with pytest.raises(HydraError, match=name):
        load_checkpoint(checkpoint, GROUPS)
    if name in ("model.safetensors", "trainer_state.json"):
        with pytest.raises(HydraError, match=name):
            Run.open(run_dir).load_model(build_model)
    (run_dir / "state.json").unlink()
    config = TrainingConfig.from_json((run_dir / "config.json").read_text())
    with pytest.raises(HydraError, match=name):
        Trainer(config, run_dir).train()


def test_a_checkpoints_manifest(run_dir: Path, payload: bytes) -> None:
    checkpoint = list_checkpoints(run_dir)[-1]
    (checkpoint / "manifest.json").write_bytes(payload)
    with pytest.raises(HydraError, match=r"manifest\.json"):
        load_checkpoint(checkpoint, GROUPS)


def test_a_header_of_a_hundred_megabytes(run_dir: Path) -> None:
    header = b"{" + b" " * 100_000_000 + b"}"
    checkpoint = list_checkpoints(run_dir)[-1]
    plant(checkpoint / "model.safetensors", struct.pack("<Q", len(header)) + header, checkpoint / "manifest.json")
    with pytest.raises(HydraError, match=r"model\.safetensors"):
        load_checkpoint(checkpoint, ("model",))


def test_a_tokenizer(run_dir: Path, payload: bytes, tmp_path: Path, corpus_dir: Path) -> None:
    (run_dir / "tokenizer.json").write_bytes(payload)
    with pytest.raises(RunError, match=r"tokenizer\.json"):
        Run.open(run_dir).load_tokenizer()
    config = TrainingConfig.preset("tiny", corpus=str(corpus_dir), tokenizer=str(run_dir / "tokenizer.json"))
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        check_corpus(config.data_spec(), tmp_path)


@pytest.fixture
def shards(run_dir: Path, shared_data_dir: Path, tmp_path: Path) -> Path:
    fingerprint = read_json(run_dir / "data.json")["fingerprint"]
    return Path(shutil.copytree(shared_data_dir / fingerprint, tmp_path / "data" / fingerprint))


@pytest.mark.parametrize("name", ["train-00000.bin", "tokenizer.json"])
def test_a_shard_or_its_tokenizer(run_dir: Path, shards: Path, payload: bytes, name: str) -> None:
    manifest = read_json(run_dir / "data.json")
    (shards / name).write_bytes(payload)
    with pytest.raises(DataError, match=name):
        open_dataset(manifest, shards.parent)


def test_a_tokenizer_that_its_manifest_knows(run_dir: Path, shards: Path, payload: bytes) -> None:
    manifest = read_json(run_dir / "data.json")
    (shards / "tokenizer.json").write_bytes(payload)
    manifest["tokenizer"]["sha256"] = hashlib.sha256(payload).hexdigest()
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        open_dataset(manifest, shards.parent)


def test_a_shard_that_its_manifest_knows_is_read_as_numbers(run_dir: Path, shards: Path, tmp_path: Path) -> None:
    payload = pickle.dumps(Touch(tmp_path / "sentinel")).ljust(4096, b"\0")
    manifest = read_json(run_dir / "data.json")
    (shards / "train-00000.bin").write_bytes(payload)
    known = {"n_bytes": 4096, "n_tokens": 2048, "sha256": hashlib.sha256(payload).hexdigest()}
    manifest["splits"]["train"]["shards"] = [{"file": "train-00000.bin", **known}]
    batch = open_dataset(manifest, shards.parent).train_batch(0, seed=0, n_rows=2, n_tokens=32)
    assert batch.inputs_BT.dtype == np.int64


@pytest.mark.parametrize(
    ("dtype", "file"), [("O", "train-00000.bin"), ("<u2", "../../sentinel"), ("<u2", "/etc/passwd")]
)
def test_a_manifest_that_names_what_no_build_does(run_dir: Path, shards: Path, dtype: str, file: str) -> None:
    manifest = read_json(run_dir / "data.json")
    manifest["dtype"] = dtype
    manifest["splits"]["train"]["shards"][0]["file"] = file
    with pytest.raises(DataError, match=r"must be (stored as one of|called train)"):
        open_dataset(manifest, shards.parent)


@pytest.mark.parametrize("name", ["data.json", "environment.json", "memory.json", "state.json", "config.json"])
def test_json_of_a_run(run_dir: Path, payload: bytes, name: str) -> None:
    (run_dir / name).write_bytes(payload)
    with pytest.raises(RunError, match=name):
        read_json(run_dir / name)


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

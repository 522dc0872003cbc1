"""Files that stand in the place of a run's own. Those that Python can be made to run touch a sentinel when they are."""

import hashlib
import io
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]

from hydra.data import open_dataset
from hydra.model.framework import build_model
from hydra.runtime import Run, paths
from hydra.runtime.checkpoint import MANIFEST, list_checkpoints, load_checkpoint

GROUPS = ("model", "optimizer", "rng")


class Touch:
    """What unpickles to an open file, which then is there."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.sentinel), "w")


def torch_zip(sentinel: Path) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save({"weight": Touch(sentinel)}, buffer)
    return buffer.getvalue()


def numpy_objects(sentinel: Path) -> bytes:
    """An array of Python objects, which numpy pickles."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Touch(sentinel)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def overlapping(sentinel: Path) -> bytes:
    """safetensors, two tensors of which share bytes."""
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
"""What runs when somebody opens it so: the control."""


def copy_with_shards(run_dir: Path, to: Path) -> Path:
    """A copy of the run, with the shards that it trained on in the copy's folder `shards`."""
    shutil.copytree(run_dir, to)
    data_dir = Path(paths.read_json(run_dir / paths.CONFIG)["data_dir"])
    fingerprint = paths.read_json(run_dir / paths.MANIFEST)["fingerprint"]
    shutil.copytree(data_dir / fingerprint, shards_of(to) / fingerprint)
    return to


def shards_of(run_dir: Path) -> Path:
    """The data_dir of a copy."""
    return run_dir / "shards"


def put(run_dir: Path, pattern: str, payload: bytes) -> Path:
    """Write the payload over a file of a run, the last that fits; one of a checkpoint is what its manifest expects."""
    path = sorted(run_dir.glob(pattern))[-1]
    path.write_bytes(payload)
    manifest = path.with_name(MANIFEST)
    if path != manifest and list_checkpoints(run_dir)[-1] == path.parent:
        path.with_name(".metadata").write_bytes(payload)
        described = json.loads(manifest.read_text())
        described["files"][path.name] = {"n_bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
        manifest.write_text(json.dumps(described, indent=2) + "\n")
    return path


def _load_checkpoint(run: Run) -> object:
    return load_checkpoint(list_checkpoints(run.directory)[-1], GROUPS)


def _load_model(run: Run) -> object:
    return run.load_model(build_model)


def _open_shards(run: Run) -> object:
    return open_dataset(run.manifest(), shards_of(run.directory))


READERS: tuple[tuple[str, Callable[[Run], object]], ...] = (
    *((f"checkpoints/*/{group}.safetensors", _load_checkpoint) for group in GROUPS),
    ("checkpoints/*/trainer_state.json", _load_checkpoint),
    ("checkpoints/*/manifest.json", _load_checkpoint),
    ("checkpoints/*/model.safetensors", _load_model),
    ("checkpoints/*/trainer_state.json", _load_model),
    ("tokenizer.json", Run.load_tokenizer),
    ("shards/*/train-00000.bin", _open_shards),
    ("shards/*/tokenizer.json", _open_shards),
    ("data.json", Run.manifest),
    ("environment.json", Run.environment),
    ("memory.json", Run.memory_plan),
    ("state.json", Run.status),
    ("config.json", Run.config),
)
"""Files of a run, as patterns of their names, each with what reads it."""

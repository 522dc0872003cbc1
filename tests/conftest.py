"""Fixtures that several folders of tests share: a small corpus of our own making, and real trainers on it."""

import importlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hydra.kernels.dispatch import is_triton_installed
from hydra.testing import storm
from scripts.config import TrainingConfig

ROOT = Path(__file__).parents[1]
SLOW_IMPORT = """
import sys, time
from pathlib import Path
here = Path(__file__).parent
(here / "begun").touch()
while not (here / "may_end").exists():
    time.sleep(0.01)
sys.path.remove(str(here))
del sys.modules["torch"]
import torch
"""


def import_interpreted() -> None:
    """Import triton, and all kernels, as the interpreter; processes that tests start are not told."""
    assert "triton" not in sys.modules, "triton must not be imported before tests/conftest.py is"
    os.environ["TRITON_INTERPRET"] = "1"
    triton = importlib.import_module("triton")
    for path in sorted((ROOT / "hydra").rglob("_triton/[a-z]*.py")):
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    del os.environ["TRITON_INTERPRET"]
    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True


if is_triton_installed():
    import_interpreted()


@pytest.fixture(autouse=True)
def deterministic_mode_ends_with_the_test() -> Iterator[None]:
    """A trainer turns it on for its process, which is the tests' own where one is trained in place."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def corpus_dir() -> Path:
    """40 documents, about 55 kB of text of our own making."""
    return ROOT / "tests" / "assets" / "notes"


@pytest.fixture(scope="session")
def shared_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, shared_data_dir: Path) -> Callable[..., Path]:
    """make_run(name, **fields): a run directory with the `tiny` preset's config, not started."""

    def make(name: str, **fields: object) -> Path:
        run_dir = tmp_path_factory.mktemp("workspace") / "runs" / name
        run_dir.mkdir(parents=True)
        fields = {"corpus": str(corpus_dir), "data_dir": str(shared_data_dir), "threads": 1, **fields}
        (run_dir / "config.json").write_text(TrainingConfig.preset("tiny", **fields).to_json())
        return run_dir

    return make


@pytest.fixture(scope="session")
def start_trainer() -> Callable[[Path], "subprocess.Popen[str]"]:
    """The README's command on a run directory, in a process group of its own."""
    return storm.start_trainer


@pytest.fixture
def stopped_while_torch_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> "Callable[[Callable[[], subprocess.Popen[str]]], str]":
    """Starts a process, sends SIGTERM while it imports torch, and wants it to end as one that goes on (75).

    That import takes a second, and from a cold network disk many. Gives what was written to standard error.
    """
    (tmp_path / "torch.py").write_text(SLOW_IMPORT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def stopped(start: "Callable[[], subprocess.Popen[str]]") -> str:
        process, deadline = start(), time.monotonic() + 60
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        (tmp_path / "may_end").touch()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 75, errors
        return errors

    return stopped


@pytest.fixture(scope="session")
def weights_hash() -> Callable[[Path], str]:
    """SHA-256 over name, dtype, shape and bytes of every tensor in the newest checkpoint, and its step."""
    return storm.weights_hash


@pytest.fixture(scope="session")
def figures() -> Callable[[Path], list[dict[str, object]]]:
    """The records of metrics.jsonl without what the clock and the machine decide."""
    return storm.figures


@pytest.fixture
def moments(request: pytest.FixtureRequest) -> random.Random:
    """Random moments that no test chooses: another seed in every session, printed when the test fails."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"{request.node.name}: moments drawn with seed {seed}")
    return random.Random(seed)

"""Building: the same bytes in every process, once for all of them, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hydra.data import Dataset, DataSpec, prepare_dataset
from hydra.data import build as build_module
from hydra.errors import DataError

REPOSITORY = Path(__file__).parents[3]
PRELUDE = """
import json, logging, os, signal, sys, time
from pathlib import Path
from hydra.data import DataSpec, build, prepare_dataset
logging.basicConfig(level=logging.INFO, format="%(message)s")
folder = Path(sys.argv[1])
spec = DataSpec(corpus=(str(folder / "corpus"),), tokenizer="bpe", vocab_size=300, validation_fraction=0.1)
"""


def start(code: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env={**os.environ, **environment},
    )  # fmt: skip


def test_another_process_builds_the_same_bytes(dataset: Dataset, tmp_path: Path) -> None:
    process = start(
        'prepare_dataset(spec, folder / "other", folder)', tmp_path, PYTHONHASHSEED="7", RAYON_NUM_THREADS="1"
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    (other,) = (path for path in (tmp_path / "other").iterdir() if path.is_dir())
    assert other.name == dataset.directory.name
    for name in ["tokenizer.json", "manifest.json", "train-00000.bin", "validation-00000.bin"]:
        assert (other / name).read_bytes() == (dataset.directory / name).read_bytes(), name


def test_manifest_tells_what_is_there(dataset: Dataset, corpus_folder: Path) -> None:
    manifest = json.loads((dataset.directory / "manifest.json").read_text())
    assert manifest == dataset.manifest
    splits = manifest["splits"]
    assert splits["train"]["n_documents"] + splits["validation"]["n_documents"] == manifest["corpus"]["n_documents"]
    n_bytes = sum(path.stat().st_size for path in corpus_folder.iterdir())
    assert splits["train"]["n_bytes"] + splits["validation"]["n_bytes"] == manifest["corpus"]["n_bytes"] == n_bytes
    assert manifest["tokenizer"] == {**manifest["tokenizer"], "kind": "bpe", "vocab_size": 300, "bos_id": 0}
    assert 0 < manifest["yardsticks"]["bigram_bits_per_byte"] < manifest["yardsticks"]["unigram_bits_per_byte"] < 8
    assert manifest["dtype"] == "<u2"


def test_second_call_builds_nothing(
    dataset: Dataset, spec: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "build_dataset", None)
    assert prepare_dataset(spec, tmp_path / "data", tmp_path).manifest == dataset.manifest


def test_same_text_under_another_name_shares_the_shards(
    dataset: Dataset, spec: DataSpec, corpus_folder: Path, tmp_path: Path
) -> None:
    renamed = corpus_folder.rename(tmp_path / "renamed")
    other = DataSpec(("renamed",), spec.tokenizer, spec.vocab_size, spec.validation_fraction)
    again = prepare_dataset(other, tmp_path / "data", tmp_path)
    assert again.directory == dataset.directory and renamed.is_dir()
    assert again.manifest["corpus"] == {**dataset.manifest["corpus"], "names": ["renamed"]}


@pytest.mark.parametrize("change", ["text", "border", "tokenizer", "vocab_size", "fraction"])
def test_fingerprint_changes_with_everything_that_decides_a_token(
    change: str, dataset: Dataset, spec: DataSpec, corpus_folder: Path, tmp_path: Path
) -> None:
    fields = {"corpus": spec.corpus, "tokenizer": "bpe", "vocab_size": 300, "validation_fraction": 0.1}
    if change == "text":
        (corpus_folder / "00.txt").write_text("another text\n")
    elif change == "border":
        first, second = corpus_folder / "00.txt", corpus_folder / "01.txt"
        text = second.read_text(encoding="utf-8")
        first.write_text(first.read_text(encoding="utf-8") + text[:10], encoding="utf-8")
        second.write_text(text[10:], encoding="utf-8")
    else:
        key = "validation_fraction" if change == "fraction" else change
        fields[key] = {"tokenizer": "bytes", "vocab_size": 301, "validation_fraction": 0.11}[key]
    other = prepare_dataset(DataSpec(**fields), tmp_path / "data", tmp_path)  # type: ignore[arg-type]
    assert other.manifest["fingerprint"] != dataset.manifest["fingerprint"]


@pytest.mark.parametrize("where", ["build.compute_yardsticks", "Path.rename"])
def test_build_that_is_killed_leaves_nothing_that_counts(where: str, spec: DataSpec, tmp_path: Path) -> None:
    kill = f'{where} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\nprepare_dataset(spec, folder / "data", folder)'
    process = start(kill, tmp_path)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    (left,) = (path for path in (tmp_path / "data").iterdir() if path.is_dir())
    assert left.suffix == ".building" and (left / "train-00000.bin").exists()
    dataset = prepare_dataset(spec, tmp_path / "data", tmp_path)
    assert [path for path in (tmp_path / "data").iterdir() if path.is_dir()] == [dataset.directory]
    dataset.train_batch(0, seed=0, n_rows=1, n_tokens=8)


def test_build_that_fails_cleans_up(spec: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DataError("no")

    monkeypatch.setattr(build_module, "check_lossless", fail)
    with pytest.raises(DataError, match="no"):
        prepare_dataset(spec, tmp_path / "data", tmp_path)
    assert not [path for path in (tmp_path / "data").iterdir() if path.is_dir()]


def test_two_processes_at_once_build_once(spec: DataSpec, tmp_path: Path) -> None:
    code = """
make = build.build_tokenizer
def slowly(*arguments):
    (folder / "first_is_building").touch()
    time.sleep(1.5)
    return make(*arguments)
build.build_tokenizer = slowly
dataset = prepare_dataset(spec, folder / "data", folder)
print(dataset.manifest["fingerprint"])
"""
    first = start(code, tmp_path)
    second = start('while not (folder / "first_is_building").exists(): time.sleep(0.01)' + code, tmp_path)
    outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert first.returncode == second.returncode == 0, outputs
    assert outputs[0][0] == outputs[1][0] != ""
    assert "built the dataset" in outputs[0][1]
    assert "built the dataset" not in outputs[1][1] and "waiting for it" in outputs[1][1]


def test_folder_without_manifest_is_refused(dataset: Dataset, spec: DataSpec, tmp_path: Path) -> None:
    (dataset.directory / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json must be the manifest .* delete the folder"):
        prepare_dataset(spec, tmp_path / "data", tmp_path)


def test_large_vocabulary_takes_four_bytes_per_token(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("".join(map(chr, range(0x10000, 0x20100))), encoding="utf-8")
    (tmp_path / "b").write_text("hello", encoding="utf-8")
    dataset = prepare_dataset(DataSpec(("a", "b"), "characters", 4096, 0.02), tmp_path / "data", tmp_path)
    assert dataset.manifest["dtype"] == "<u4" and dataset.manifest["tokenizer"]["vocab_size"] > 1 << 16
    largest = max(batch.targets_BT.max() for batch in (dataset.train_batch(0, seed=0, n_rows=3000, n_tokens=16),))
    assert largest >= 1 << 16
    (ids,) = [dataset.tokenizer.encode("\U000200ff").ids]
    assert dataset.tokenizer.decode(ids) == "\U000200ff"


def test_importing_data_imports_no_torch() -> None:
    code = "import sys, hydra.data; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)

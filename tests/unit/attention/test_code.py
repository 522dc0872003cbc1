"""Classes by path: what is read of them without running them, whose code may run, and which."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra.attention import build_attention, check_options, plan_layers, record_plan_code
from hydra.attention.code import load_class, load_copies, read_code, record_code, split_name, write_copies
from hydra.errors import ConfigError
from hydra.model.framework import ModelSpec, build_model
from hydra.testing.specs import tiny_model_spec

ROOT = Path(__file__).parents[3]
CONVOLUTION = "notebooks/examples/attention_classes/convolution.py:ConvolutionMixer"
SOURCE = """
from torch import nn

class Mine(nn.Module):
    options = {"window": 64, "sharp": False, "base": 10.0}

    def __init__(self, spec):
        super().__init__()
        self.proj = nn.Linear(spec.d_model, spec.d_model)
        self.window = spec.options["window"]

    def forward(self, x_BTD, positions_BT, document_ids_BT):
        return self.proj(x_BTD)
"""


def write(tmp_path: Path, source: str = SOURCE, name: str = "mine.py") -> str:
    (tmp_path / name).write_text(source)
    return f"{tmp_path / name}:Mine"


def hash_of(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


def test_a_name_is_a_path_and_a_class() -> None:
    assert split_name("some/where/my-file.v2.py:Mine") == ("some/where/my-file.v2.py", "Mine")
    assert split_name("gqa") is None
    assert split_name("mine.py") is None


def test_the_record_holds_hash_and_options_and_nothing_is_run(tmp_path: Path) -> None:
    source = f"{SOURCE}\nraise SystemExit('it ran')\n"
    name = write(tmp_path, source)
    records = record_plan_code(f"2*{name}, gqa", {}, tmp_path)
    options = {"window": 64, "sharp": False, "base": 10.0}
    assert records == {str(tmp_path / "mine.py"): {"sha256": hash_of(source), "options": {"Mine": options}}}
    check_options(name, 32, 4, {"window": 3, "base": 2})
    with pytest.raises(SystemExit, match="it ran"):
        build_attention(name, d_model=32, n_heads=4)


def test_reading_needs_no_torch() -> None:
    code = (
        "import sys; from hydra.attention import check_options\n"
        f"check_options({CONVOLUTION!r}, 32, 4, {{'kernel_size': 2}}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "must be readable, but .*No such file"),
        ("class Mine(:", "must be Python, but got in .*mine.py, line 1"),
        ("class Mind: pass", "class of mine.py must be one of Mind, but got .*'Mine'; did you mean 'Mind'"),
        ("class Mine: pass", "Mine has no __init__; add it"),
        (SOURCE.replace("def __init__(self, spec)", "def __init__(self, spec, more)"), "line 7 .*spec, more"),
        (SOURCE.replace("def __init__(self, spec)", "def __init__(self, spec, *, more)"), "line 7 .*more"),
        (SOURCE.replace("def forward", "def fast_forward"), "Mine has no forward; add it"),
        (SOURCE.replace("x_BTD, positions_BT, document_ids_BT)", "x_BTD)"), r"line 12 .*forward\(self, x_BTD\)"),
        (SOURCE.replace("positions_BT, document_ids_BT", "document_ids_BT, positions_BT"), r"line 12 .*; correct it"),
        (SOURCE.replace("64", "[64]"), "must be a mapping of names to a number.*line 5"),
        (SOURCE.replace("64", "2 ** WIDTH"), "must be a mapping of names to a number.*line 5"),
    ],
)
def test_what_is_no_attention_class_is_refused(tmp_path: Path, source: str | None, message: str) -> None:
    name = write(tmp_path, source or "")
    if source is None:
        (tmp_path / "mine.py").unlink()
    with pytest.raises(ConfigError, match=message):
        record_code([name], {}, tmp_path)


@pytest.mark.parametrize(
    "arguments", ["x, p, d", "x, p, d, scale=1.0", "x_BTD, document_positions, packs, *, y=1", "x, p, /, d"]
)
def test_arguments_have_any_names(tmp_path: Path, arguments: str) -> None:
    source = SOURCE.replace("x_BTD, positions_BT, document_ids_BT", arguments).replace("proj(x_BTD)", "proj(x_BTD)")
    source = source.replace("(x_BTD)", f"({arguments.split(',')[0]} + 0 * {arguments.split(', ')[1]}[..., None])")
    source = source.replace("def __init__(self, spec)", "def __init__(self, told)").replace("spec.", "told.")
    layer = build_attention(write(tmp_path, source), d_model=32, n_heads=4)
    assert layer(torch.ones(2, 3, 32), document_ids_BT=torch.ones(2, 3, dtype=torch.int64)).shape == (2, 3, 32)


def test_a_file_that_raises_is_named_with_its_line(tmp_path: Path) -> None:
    name = write(tmp_path, f"{SOURCE}\nwidth = 1 / 0\n")
    with pytest.raises(ConfigError, match=r"must run when it is imported, .*, at mine.py:15 `width = 1 / 0`; correct"):
        build_attention(name, d_model=32, n_heads=4)


def test_a_base_in_the_same_file_counts(tmp_path: Path) -> None:
    write(tmp_path, f"{SOURCE}\nclass Other(Mine):\n    options = {{'window': 3}}\n")
    assert read_code(tmp_path / "mine.py", "Other")[1] == {"window": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windov": 3}, "did you mean 'window'"),
        ({"window": 3.5}, "window must be of type int, as its default 64 is, but got window=3.5"),
        ({"window": True}, "window must be of type int"),
        ({"sharp": 1}, "sharp must be of type bool"),
        ({"base": "10"}, "base must be of type float"),
    ],
)
def test_options_are_checked(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(write(tmp_path), 32, 4, options)


def test_in_a_plan_options_go_to_the_layers_that_have_them(tmp_path: Path) -> None:
    name = write(tmp_path)
    attention = f"2*{name}(window=8), gqa"
    code = record_plan_code(attention, {}, tmp_path)
    options = {"window": 32, "sharp": True, "n_kv_heads": 2}
    layers = plan_layers(attention, d_model=32, n_heads=4, n_layers=4, options=options, code=code)
    assert [layer.name for layer in layers] == [name, name, "gqa", name]
    assert layers[0].spec.options == {"window": 8, "sharp": True, "base": 10.0}  # type: ignore[attr-defined]
    assert (layers[2].spec.window, layers[2].spec.n_kv_heads) == (32, 2)  # type: ignore[attr-defined]
    assert (layers[3].spec.layer_index, layers[3].spec.head_width) == (3, 8)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    mine, theirs = write(tmp_path), write(tmp_path / "other", SOURCE + "\n")
    with pytest.raises(ConfigError, match=r"several that are called mine.py; rename one"):
        record_code([mine, theirs], {}, tmp_path)


def test_what_is_recorded_is_not_read_again(tmp_path: Path) -> None:
    name = write(tmp_path)
    records = record_code([name], {}, tmp_path)
    write(tmp_path, SOURCE + "\n")
    assert record_code([name], records, tmp_path) == records
    assert record_code([name], {}, tmp_path) != records


def test_only_what_somebody_vouched_for_is_run(tmp_path: Path) -> None:
    source = f"{SOURCE}\n# of somebody else\n"
    record = {"sha256": hash_of(source), "options": {"Mine": {"window": 64}}}
    name = f"{tmp_path}/mine.py:Mine"
    spec = tiny_model_spec(attention=name, attention_code={f"{tmp_path}/mine.py": record})
    with pytest.raises(ConfigError, match=rf"trusted by name .* SHA-256 {record['sha256']}.*trust_code=True"):
        build_model(spec)
    (tmp_path / "code").mkdir()
    write(tmp_path / "code", source)
    assert build_model(spec, code_dir=tmp_path / "code").blocks[1].attention.spec.sha256 == record["sha256"]


def test_what_is_stored_may_not_name_other_files_here(tmp_path: Path) -> None:
    """A checkpoint of somebody else that names a file and no hash must not make us read and run that file."""
    stored = tiny_model_spec().to_dict() | {"attention": write(tmp_path, f"{SOURCE}\n# here\n"), "attention_code": {}}
    with pytest.raises(ConfigError, match="must hold the SHA-256 and options"):
        ModelSpec.from_dict(stored)


def test_a_changed_copy_is_refused_with_both_hashes(tmp_path: Path) -> None:
    name = write(tmp_path)
    records = record_code([name], {}, tmp_path)
    copy = tmp_path / "code" / "mine.py"
    write_copies(records, tmp_path / "code", Path.write_bytes)
    load_copies(records, tmp_path / "code")
    copy.write_text(SOURCE + "\n")
    with pytest.raises(ConfigError, match=rf"has SHA-256 {hash_of(SOURCE + chr(10))} .* says {hash_of(SOURCE)}"):
        load_copies(records, tmp_path / "code")
    with pytest.raises(ConfigError, match="is another; remove it"):
        write_copies(records, tmp_path / "code", Path.write_bytes)
    copy.unlink()
    with pytest.raises(ConfigError, match=r"mine.py is missing; put it back"):
        load_copies(records, tmp_path / "code")


def test_a_file_that_needs_its_neighbours_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "helper = 1", "my_helper.py")
    name = write(tmp_path, f"from my_helper import helper\n{SOURCE}")
    sha256, _ = read_code(tmp_path / "mine.py", "Mine")
    with pytest.raises(ConfigError, match=r"must stand alone .* No module named 'my_helper'"):
        load_class(name, sha256)

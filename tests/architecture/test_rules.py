"""Rules of the house that a reader would otherwise have to trust."""

import ast
import inspect
import itertools
import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from scripts.config import PRESETS, TrainingConfig

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for package in ("hydra", "scripts") for path in (ROOT / package).rglob("*.py"))
PRODUCT = [path for path in SOURCES if "tests" not in path.parts]


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def test_only_the_trainer_steps_an_optimizer() -> None:
    for path in PRODUCT:
        stepping = [call for call in calls(path) if isinstance(call.func, ast.Attribute) and call.func.attr == "step"]
        assert bool(stepping) is (path == ROOT / "scripts" / "trainer.py"), path


SHIMS = [
    *sorted(
        path for path in (ROOT / "hydra" / "attention").glob("*.py") if (path.parent / "backends" / path.stem).is_dir()
    ),
    *(ROOT / "hydra" / "model" / "ccgqa").glob("*.py"),
]


@pytest.mark.parametrize("path", SHIMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shims_define_nothing(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda), ast.unparse(
            node
        )


def test_there_are_shims() -> None:
    assert {path.stem for path in SHIMS} >= {"gqa", "ccgqa", "lightning", "__init__"}


def test_every_config_field_is_documented() -> None:
    tree = ast.parse(inspect.getsource(TrainingConfig))
    body = tree.body[0].body  # type: ignore[attr-defined]
    documented = {
        node.target.id: after.value.value
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }
    assert set(documented) == {field.name for field in fields(TrainingConfig)}
    assert all(len(text) >= 15 for text in documented.values())


def test_every_config_field_is_read_by_something() -> None:
    own = (ROOT / "scripts" / "config.py").read_text()
    handed_on = own[own.index("def data_spec") : own.index("def differences")]
    others = "".join(path.read_text() for path in PRODUCT if path.name != "config.py")
    for field in fields(TrainingConfig):
        is_read = re.search(rf"config\.{field.name}\b", others) or re.search(rf"self\.{field.name}\b", handed_on)
        assert is_read or field.name == "preset_name", field.name


def test_every_preset_is_a_config() -> None:
    for name in PRESETS:
        assert TrainingConfig.preset(name).preset_name == name


def test_config_is_never_read_with_a_default_and_weights_never_loosely() -> None:
    for path in PRODUCT:
        for call in calls(path):
            written = ast.unparse(call)
            assert not (written.startswith("getattr(") and "config" in written and len(call.args) > 2), (
                f"{path}: {written}"
            )
            loose = [
                keyword
                for keyword in call.keywords
                if keyword.arg == "strict" and ast.unparse(keyword.value) == "False"
            ]
            assert not (loose and "state_dict" in written), f"{path}: {written}"


def test_no_handler_swallows_what_it_does_not_name() -> None:
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            ):
                assert any(isinstance(inner, ast.Raise) for inner in ast.walk(node)), f"{path}:{node.lineno}"


def test_no_pickle_is_ever_opened() -> None:
    # It makes those that must not be opened, and opens them to show that they would have run.
    hostile = ROOT / "hydra" / "testing" / "hostile" / "files.py"
    for path in set(PRODUCT) - {hostile}:
        text = path.read_text()
        for word in ("import pickle", "torch.load(", "allow_pickle=True", "torch.save("):
            assert word not in text, f"{path}: {word}"


def test_code_is_loaded_by_path_in_one_place() -> None:
    """That place checks a hash first; everything else is imported by its name."""
    loading = {"exec", "eval", "compile", "runpy", "spec_from_file_location", "SourceFileLoader", "run_path"}
    found = set()
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in loading:
                found.add(path)
            if isinstance(node, ast.Attribute | ast.alias) and getattr(node, "attr", getattr(node, "name", "")) in (
                loading - {"compile", "eval", "exec"}  # methods of torch's modules, regular expressions, Qt
            ):
                found.add(path)
    assert found == {ROOT / "hydra" / "attention" / "code.py"}


def test_notebooks_hold_parameters_calls_and_words() -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        notebook = json.loads(path.read_text())
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
        assert len(tagged) == 1, path
        for cell in cells:
            assert cell["outputs"] == [], path
            assert cell["execution_count"] is None, path
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                forbidden = ast.For | ast.While | ast.FunctionDef | ast.ClassDef | ast.Lambda
                assert not isinstance(node, forbidden), f"{path}: {ast.unparse(node)}"


def test_the_conda_environment_repeats_no_package_of_pyproject() -> None:
    yaml = pytest.importorskip("yaml")
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [
        *project["dependencies"],
        # flash-attn is compiled against the torch that is there, and only where there is a GPU.
        *(entry for name, extra in project["optional-dependencies"].items() if name != "flash" for entry in extra),
    ]
    python_packages = {re.split(r"[<>=!~ ;\[]", entry)[0].lower() for entry in named}
    conda, pip = [], []
    for entry in environment["dependencies"]:
        if isinstance(entry, dict):
            pip += entry["pip"]
        else:
            conda.append(re.split(r"[<>=!~ ]", entry)[0].lower())
    assert not python_packages & set(conda)
    assert not python_packages & {re.split(r"[<>=!~ ;\[]", entry)[0].lower() for entry in pip}
    assert any("requirements.lock" in entry for entry in pip)
    # torch is not in the lock: the documented command has to bring it.
    assert "pip install --editable .\n" in (ROOT / "environment.yml").read_text()
    assert "python" in conda


def test_the_lock_holds_every_package_that_pyproject_names_but_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [
        *project["dependencies"],
        # flash-attn is compiled against the torch that is there, and only where there is a GPU.
        *(entry for name, extra in project["optional-dependencies"].items() if name != "flash" for entry in extra),
    ]
    lock = (ROOT / "requirements.lock").read_text()
    locked = set(re.findall(r"^([a-z0-9._-]+)==", lock, flags=re.MULTILINE))
    assert {re.split(r"[<>=!~ ;\[]", entry)[0].lower() for entry in named} - locked == {"torch"}
    entries = re.split(r"\n(?=[a-z0-9._-]+==)", lock)[1:]
    assert all("--hash=sha256:" in entry for entry in entries)

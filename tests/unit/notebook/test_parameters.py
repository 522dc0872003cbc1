import math
from collections.abc import Mapping
from typing import Annotated, Literal

import nbformat
import pytest
from papermill.parameterize import parameterize_notebook

from hydra.errors import ConfigError
from hydra.notebook.parameters import (
    assigned_parameters,
    check_names,
    explain_traps,
    read_parameters,
    resolve_run_dir,
    run_directory,
    with_trap_hints,
)

HEAD = "# Parameters: what one may change\n"


def notebook(*sources: str) -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]}) for source in sources]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}, "papermill": {}}
    return nbformat.v4.new_notebook(
        cells=[*cells, nbformat.v4.new_code_cell("x = 1", metadata={"tags": []})], metadata=kernel
    )


def test_every_way_to_assign_a_plain_value_is_read() -> None:
    source = HEAD + (
        'a: int | None = None\nb: Literal["x"] = "x"\nc = "k=v"  # a comment\nd: "float" = -1e-3\n'
        'e = f = [1, {"g": (2, True)}]\nh = """two\nlines"""\ni = float("inf")\nj = 1;k = 2\n'
    )
    values = assigned_parameters(notebook(source))
    assert values == {
        "a": None,
        "b": "x",
        "c": "k=v",
        "d": -1e-3,
        "e": [1, {"g": (2, True)}],
        "f": [1, {"g": (2, True)}],
        "h": "two\nlines",
        "i": math.inf,
        "j": 1,
        "k": 2,
    }


def test_what_papermill_injects_is_read_back_as_it_was() -> None:
    given = {
        "preset": "tiny",
        "rate": 3e-4,
        "big": math.inf,
        "low": -math.inf,
        "flag": False,
        "none": None,
        "text": 'quote " and \\ and \n and {brace}',
        "nested": {"a": [1, {"b": math.inf}]},
    }
    nb = parameterize_notebook(notebook(HEAD + 'preset = "debug"\nkept = 1'), given)
    assert assigned_parameters(nb) == {"kept": 1, **given}


def test_not_a_number_is_read() -> None:
    assert math.isnan(assigned_parameters(parameterize_notebook(notebook(HEAD), {"x": math.nan}))["x"])


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "a = 1 + n",
        "a = open('x')",
        "a.b = 1",
        "a[0] = 1",
        "a, b = 1, 2",
        "print(1)",
        "a += 1",
        "a: int",
        "float('inf')",
        "a = float('1')",
        "if True: a = 1",
        "a = __import__('os')",
        "a = f'{1}'",
        "a = =",
    ],
)
def test_anything_else_in_a_parameters_cell_is_refused(line: str) -> None:
    with pytest.raises(ConfigError, match="a parameters cell must"):
        assigned_parameters(notebook(HEAD + line))


@pytest.mark.parametrize("source", ["a = 1", "", "# parameters\na = 1", "# Parameters\na = 1"])
def test_a_parameters_cell_says_what_it_is(source: str) -> None:
    with pytest.raises(ConfigError, match="must begin with a comment"):
        assigned_parameters(notebook(source))


def test_there_is_one_parameters_cell() -> None:
    with pytest.raises(ConfigError, match="must have one cell tagged"):
        assigned_parameters(notebook(HEAD, HEAD))


@pytest.mark.parametrize("name", ["a=1; import os; b", "a b", "1a", "class", "", "a.b", "a\nimport os\nb"])
def test_names_that_are_code_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="plain Python name"):
        check_names(["fine", name])


TYPES: Mapping[str, object] = {
    "flag": bool,
    "steps": Annotated[int, "positive"],
    "rate": Annotated[float, "positive"],
    "name": Annotated[str, "short"],
    "choice": Literal["a", "b"],
    "paths": Annotated[tuple[str, ...], "paths"],
    "options": dict[str, bool | int],
    "maybe": str | None,
}


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("flag", "false", "-p flag False"),
        ("flag", "False", "numpy bool"),
        ("flag", 0, "-p flag False"),
        ("name", math.inf, "-r name"),
        ("rate", math.inf, "12e4567"),
        ("rate", math.nan, "nan"),
        ("steps", math.inf, "12e4567"),
        ("name", 1, "-r name"),
        ("name", True, "-r name"),
        ("choice", 1.5, "-r choice"),
        ("steps", 1e3, "-p steps 1000"),
        ("steps", "3", "numpy"),
        ("rate", "1e-3", "-p rate NUMBER"),
        ("paths", "[a, b]", "-y '{paths: [a, b]}'"),
        ("options", "{a: 1}", "-y '{options: {key: value}}'"),
    ],
)
def test_traps_are_explained(name: str, value: object, told: str) -> None:
    assert told in explain_traps({name: value}, TYPES)[name]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flag", True),
        ("steps", 3),
        ("rate", 3),
        ("rate", 0.5),
        ("name", "x"),
        ("paths", ["a"]),
        ("options", {}),
        ("maybe", None),
        ("unknown", "false"),
    ],
)
def test_what_is_as_it_should_be_is_not_explained(name: str, value: object) -> None:
    assert explain_traps({name: value}, TYPES) == {}


def test_only_refused_parameters_are_explained() -> None:
    error = with_trap_hints(ConfigError("flag: must be a bool"), {"flag": "false", "paths": "x"}, TYPES)
    assert "-p flag False" in str(error)
    assert "paths" not in str(error)


def test_the_run_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.chdir(str(tmp_path))
    assert str(resolve_run_dir(None, "pretrain")) == f"{tmp_path}/runs/pretrain"
    assert str(resolve_run_dir("a/b", "pretrain")) == f"{tmp_path}/a/b"
    assert str(resolve_run_dir("/a/b", None)) == "/a/b"
    with pytest.raises(ConfigError, match="assign run_dir"):
        resolve_run_dir(None, None)
    for wrong in (1, True, " ", ["a"]):
        with pytest.raises(ConfigError, match="-r run_dir"):
            resolve_run_dir(wrong, "pretrain")


class Shell:
    """An IPython shell that has executed the given cells."""

    def __init__(self, *sources: str) -> None:
        self.user_ns: dict[str, object] = {"In": ["", *sources]}
        for source in sources:
            exec(source, self.user_ns)


@pytest.fixture
def execute(monkeypatch: pytest.MonkeyPatch) -> object:
    def run(*sources: str) -> None:
        monkeypatch.setattr("IPython.core.getipython.get_ipython", lambda: Shell(*sources))

    return run


def test_parameters_are_read_from_the_executed_cells(
    execute: object, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.chdir(str(tmp_path))
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    old, other = HEAD + "gone = 1\n", "other = 5\n# Parameters: not the first line"
    execute(old, HEAD + "a = 1\nb = 2\nrun_dir = 'runs/mine'", "# Parameters\nb = float('inf')\nc = 'x'", other)  # type: ignore[operator]
    assert read_parameters() == {"a": 1, "b": math.inf, "c": "x"}
    assert str(run_directory()) == f"{tmp_path}/runs/mine"


def test_without_injection_there_is_only_the_declared_cell(
    execute: object, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.chdir(str(tmp_path))
    execute(HEAD + "a = 1")  # type: ignore[operator]
    assert read_parameters() == {"a": 1}
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/me/notebooks/explore 2.ipynb")
    assert str(run_directory()) == f"{tmp_path}/runs/explore 2"
    monkeypatch.setenv("JPY_SESSION_NAME", "0b1e-kernel")
    with pytest.raises(ConfigError, match="assign run_dir"):
        run_directory()
    monkeypatch.setenv("HYDRA_ENGINE_RUN_DIR", "/decided/by/engine")
    assert str(run_directory()) == "/decided/by/engine"


def test_a_parameters_cell_that_was_not_executed_is_missed(execute: object) -> None:
    execute("x = 1")  # type: ignore[operator]
    with pytest.raises(ConfigError, match="must have been executed"):
        read_parameters()


def test_outside_a_notebook_there_are_no_parameters() -> None:
    with pytest.raises(ConfigError, match="no IPython kernel"):
        read_parameters()

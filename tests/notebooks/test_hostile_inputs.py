"""Names, values and paths that mean harm, secrets that want out, pages that want to run, and no network."""

import ast
import base64
import json
import os
import random
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from papermill.engines import papermill_engines
from papermill.parameterize import parameterize_notebook

from hydra.errors import ConfigError, HydraError
from hydra.notebook.doors import guard_paths
from hydra.notebook.endings import BatchError
from hydra.notebook.engine import NotebookEngine
from hydra.notebook.parameters import assigned_parameters, check_names, resolve_run_dir
from hydra.notebook.plan import Plan, Request
from hydra.runtime import Run
from hydra.runtime.secrets import MASK
from hydra.testing.hostile import job, pages, secrets
from scripts.config import TrainingConfig
from scripts.launch import launch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Workplace = Any


def as_notebook(*sources: str, parameters: str = "# Parameters: any\n") -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source, metadata={"tags": []}) for source in sources]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    return nbformat.v4.new_notebook(cells=cells, metadata={**kernel, "papermill": {}})


# -------------------------------------------------------------------- names and values


NAMES = [
    "a=1;import os",
    "a\nimport os",
    "a b",
    "1a",
    "class",
    "",
    "a.b",
    "a[0]",
    "a:=1",
    "*a",
    "a,b",
    "__import__",
    "_",
]
NAMES += [
    "ａ",
    "é",
    "ａ=1",
    "a\0",
    "a#",
    "a\\\nb",
    "a=open('sentinel','w');b",
    "lambda",
    "None",
    "a\u2028b",
    "run_dir ",
]
HARM = [
    "open('sentinel', 'w')",
    "__import__('os').system('touch sentinel')",
    "!touch sentinel",
    "%%bash\ntouch sentinel",
]
QUOTES = [
    '"',
    "'",
    '"""',
    "'''",
    '\\"',
    "\\",
    '\n"',
    "#",
    "{x.__class__}",
    "$(touch sentinel)",
    "\0",
    "\r\n",
    "\u2028",
    "\udc80",
]


def hostile_texts(seed: int, n: int) -> list[str]:
    moves = random.Random(seed)
    return ["".join(moves.choices([*QUOTES, *HARM, "; ", "\n", "a=1"], k=moves.randint(1, 6))) for _ in range(n)]


def hostile_names(seed: int, n: int) -> list[str]:
    moves = random.Random(seed)
    return NAMES + [
        "a" + "".join(moves.choices(["=", ";", " ", "\n", ".", "(", "é", "[", *HARM], k=2)) for _ in range(n)
    ]


@pytest.mark.parametrize("name", hostile_names(0, 40))
def test_a_name_that_is_more_than_a_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="plain Python name"):
        check_names([name])


def test_a_value_is_only_ever_a_value() -> None:
    """150 of them: what papermill injects assigns each as it was given, alone and inside of lists and mappings."""
    texts = hostile_texts(1, 50)
    for text in texts:
        for value in (text, [text, {"a": text}], {text: [text]}):
            nb = parameterize_notebook(as_notebook(), {"a": value})
            (cell,) = [cell for cell in nb.cells if "injected-parameters" in cell.metadata.tags]
            assert [type(statement) for statement in ast.parse(cell.source).body] == [ast.Assign]
            assert assigned_parameters(nb) == {"a": value}


def test_values_arrive_in_the_kernel_as_they_were(workplace: Workplace) -> None:
    texts = [text for text in hostile_texts(2, 60) if "\udc80" not in text and "\0" not in text]
    workplace.write_notebook("import json\nopen('arrived', 'w').write(json.dumps(text))")
    parameters = base64.b64encode(json.dumps({"text": texts}).encode()).decode()
    done = workplace.run("-b", parameters)
    assert done.returncode == 0, done.stderr
    assert json.loads((workplace.root / "arrived").read_text()) == texts
    assert not (workplace.root / "sentinel").exists()


# -------------------------------------------------------------------- paths


class Accepted(HydraError):
    """The command passed every check of names and paths; nothing is to be executed."""


class Stopper(NotebookEngine):
    engine_name = "stopper"

    @classmethod
    def plan(cls, request: Request) -> Plan:
        raise Accepted(str(request.run_dir))


class Secret:
    SECRET = "sesame-open-now"


def contents(folder: Path) -> dict[Path, object]:
    """All that lies below, links as links."""
    return {
        path: path.readlink() if path.is_symlink() else path.is_dir() or path.read_bytes() for path in folder.rglob("*")
    }


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A workspace with links out of it, a sibling whose name begins like its own, and no way to the network."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "notebooks", root / "runs" / "mine", tmp_path / "root-x", outside / "runs"):
        folder.mkdir(parents=True)
    (root / "pyproject.toml").touch()
    nbformat.write(as_notebook("open('sentinel', 'w')"), root / "nb.ipynb")
    nbformat.write(as_notebook(), outside / "nb.ipynb")
    nbformat.write(as_notebook(), tmp_path / "root-x" / "nb.ipynb")
    (root / "runs" / "link").symlink_to(outside)
    (root / "runs" / "circle").symlink_to("circle")
    (root / "link.ipynb").symlink_to(outside / "nb.ipynb")
    (root / "nb").symlink_to(outside)
    monkeypatch.chdir(root)
    monkeypatch.setattr(papermill_engines, "_engines", {**papermill_engines._engines, "stopper": Stopper})
    plain = papermill.parameterize.parameterize_path
    guard_paths("stopper")
    reached: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: reached.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **options: reached.append(address))
    before = contents(tmp_path)
    yield root
    assert contents(tmp_path) == before
    assert reached == []
    papermill.parameterize.parameterize_path = papermill.execute.parameterize_path = plain


PARTS = [
    "..",
    ".",
    "runs",
    "link",
    "mine",
    "nb.ipynb",
    "link.ipynb",
    "circle",
    "root-x",
    "root",
    "outside",
    "nb",
    "etc",
]
PARTS += ["passwd", "{c.SECRET}", "{x.__class__}", "{pm[run_uuid].__class__}", "{x!r}", "{x:>9999}", "{0}", "{", "a\0b"]
PARTS += ["a\nb", "~", "http:", "s3:", "-", "x" * 300, "\u202e", "\udc80", "%2e%2e", "..\\..", "file", ""]
WHOLE = ["http://127.0.0.1:9/nb.ipynb", "https://github.com/a/b.ipynb", "s3://bucket/nb.ipynb", "gs://b/nb.ipynb", "-"]
WHOLE += [
    "hdfs://a/nb.ipynb",
    "adl://a/nb.ipynb",
    "abs://a/nb.ipynb",
    "file:///etc/passwd",
    "-nb.ipynb",
    "../root-x/nb.ipynb",
]
WHOLE += [
    "../root-x",
    "runs/link/x",
    "runs/link/nb.ipynb",
    "runs/mine/../../../outside/nb.ipynb",
    "link.ipynb",
    "/../etc/x",
]
WHOLE += [
    nbformat.writes(as_notebook("open('sentinel', 'w')")),
    "{}",
    '{"cells": []}.ipynb',
    "runs/{c.SECRET}.ipynb",
    "{c}",
]
WHOLE += [
    "{pm[run_uuid]:9999999999}.ipynb",
    "{pm[current_datetime_utc]:%9Y}.ipynb",
    "{pm[run_uuid][0]}.ipynb",
    "{{}}",
    "{x}/../../outside/nb.ipynb",
    "{up}/nb.ipynb",
    "{slash}nb.ipynb",
    "runs/circle/x",
    "nb/nb.ipynb",
    "",
    " ",
]


def hostile_paths(seed: int, n: int) -> list[str]:
    moves = random.Random(seed)
    made = ["/".join(moves.choices(PARTS, k=moves.randint(1, 5))) for _ in range(n)]
    return WHOLE + made + [f"/{path}" for path in made[: n // 4]]


def may_be_used(path: str, workspace: Path) -> bool:
    """Whether the path leads where paths may lead, told in another way than the product does."""
    if path.startswith("/"):
        return ".." not in path.split("/")
    real = os.path.realpath(workspace / path)
    return os.path.commonpath([real, os.path.realpath(workspace)]) == os.path.realpath(workspace)


def command(source: str, output: str, **parameters: object) -> str:
    """Why the command was refused; "" when it passed."""
    given = {"x": "plain", "up": "..", "slash": "/etc/", "c": Secret(), **parameters}
    with pytest.raises(BatchError) as caught:
        papermill.execute.execute_notebook(source, output, given, engine_name="stopper")
    assert caught.value.exit_code == 2
    assert Secret.SECRET not in str(caught.value)
    return "" if isinstance(caught.value.__cause__, Accepted) else str(caught.value)


def test_a_plain_command_passes(workspace: Path) -> None:
    assert command("nb.ipynb", "runs/nb.d/nb.ipynb", run_dir="runs/nb.d") == ""
    assert command("nb.ipynb", "runs/{x}-{pm[run_uuid]}.ipynb") == ""
    assert command("nb.ipynb", "runs/{pm[current_datetime_utc]:%Y-%m-%d %H.%M}.ipynb") == ""
    assert command("nb.ipynb", "-") == ""
    assert command("nb.ipynb", f"{workspace.parent}/root-x/out.ipynb", run_dir=f"{workspace.parent}/outside") == ""


def test_paths_of_a_notebook(workspace: Path) -> None:
    for path in hostile_paths(3, 150):
        if not command(path, "out.ipynb", run_dir="runs/mine"):
            assert may_be_used(path, workspace), path
            assert Path(path).is_file()
    for path in WHOLE:
        assert command(path, "out.ipynb", run_dir="runs/mine"), path


def test_paths_of_an_output(workspace: Path) -> None:
    for path in hostile_paths(4, 150):
        if not command("nb.ipynb", path, run_dir="runs/mine"):
            assert path == "-" or may_be_used(path.format(x="plain"), workspace), path
    for path in WHOLE:
        assert path == "-" or command("nb.ipynb", path, run_dir="runs/mine"), path


def test_paths_of_a_run(workspace: Path) -> None:
    for path in hostile_paths(5, 200):
        try:
            run_dir = resolve_run_dir(path, "nb")
        except ConfigError:
            continue
        assert may_be_used(path, workspace), path
        assert run_dir == Path(os.path.realpath(workspace / path))
    for path in (
        "../root-x",
        "..",
        "runs/link",
        "runs/link/x",
        "runs/../../outside",
        "http://e.org/x",
        "a\0b",
        "a\nb",
        "nb",
    ):
        with pytest.raises(ConfigError):
            resolve_run_dir(path, "nb")
        with pytest.raises(HydraError):
            Run.open(path)


@pytest.mark.parametrize("given", [None, "", " ", 3])
def test_what_is_no_path_is_no_run(workspace: Path, given: Any) -> None:
    with pytest.raises(ConfigError, match="must be a path"):
        Run.open(given)
    with pytest.raises(ConfigError, match="must be a path"):
        launch(TrainingConfig.preset("tiny"), given)


def test_runs_may_be_a_link_itself(workspace: Path) -> None:
    elsewhere = workspace.parent / "outside" / "runs"
    (workspace / "runs").rename(workspace / "kept")
    (workspace / "runs").symlink_to(elsewhere)
    try:
        assert resolve_run_dir("runs/a", None) == resolve_run_dir(None, "a") == elsewhere / "a"
    finally:
        (workspace / "runs").unlink()
        (workspace / "kept").rename(workspace / "runs")


@pytest.mark.parametrize("name", ["..", ".", "", "link", "a\nb", "{x}", "x" * 300, "a/b", "../a"])
def test_a_run_that_is_named_by_its_notebook_lies_in_runs(workspace: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        resolve_run_dir(None, name)


def test_a_run_directory_with_a_link_out_of_it_is_refused(workspace: Path) -> None:
    link = workspace / "runs" / "mine" / "trainer.log"
    link.symlink_to(workspace.parent / "outside" / "nb.ipynb")
    try:
        assert "is a link to" in command("nb.ipynb", "out.ipynb", run_dir="runs/mine")
    finally:
        link.unlink()


@pytest.mark.parametrize("field", ["corpus", "tokenizer", "data_dir"])
def test_paths_of_a_config(workspace: Path, field: str) -> None:
    for path in hostile_paths(6, 100):
        try:
            TrainingConfig.preset("tiny", **{field: path})
        except ConfigError as error:
            assert field in str(error)  # noqa: PT017
            continue
        assert path.isprintable()
        assert "://" not in path
        # Links are the user's own way to lead elsewhere: data often lies on another disk.
        assert ".." not in (path if path.startswith("/") else os.path.normpath(path)).split("/"), path


# -------------------------------------------------------------------- secrets, in a whole job without a network


@pytest.fixture(scope="module")
def hostile_job(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path) -> tuple[Path, str]:
    """The workspace of a job that tells every secret in every way and ends by a traceback, and what it printed."""
    root = tmp_path_factory.mktemp("hostile")
    environment = {
        "PYTHONPATH": os.pathsep.join([str(HERE / "no_network"), str(ROOT)]),
        "NETWORK_LOG": str(root.with_name("network.log")),
    }
    done = job.run_job(root, corpus_dir, environment)
    assert done.returncode == 1, done.stderr
    return root, done.stdout + done.stderr


def test_no_secret_is_left_anywhere(hostile_job: tuple[Path, str]) -> None:
    files = job.artifacts(hostile_job[0])
    assert secrets.find_leaks(files) == []
    kinds = {path.name for path in files} | {path.suffix for path in files}
    assert kinds >= {"metrics.jsonl", "state.json", "samples.jsonl", "printed.txt", ".safetensors"}
    assert any(path.parent.name == "events" for path in files)


@pytest.mark.parametrize("path", job.TOLD, ids=str)
def test_secrets_were_told_and_masked(hostile_job: tuple[Path, str], path: Path) -> None:
    """The control: without masking each of these files would have held them."""
    assert MASK in (hostile_job[0] / path).read_text()


@pytest.mark.parametrize("core", secrets.CORES)
@pytest.mark.parametrize("n_before", range(4))
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode, bytes])
def test_a_leak_is_found(tmp_path: Path, core: str, n_before: int, encode: Callable[[bytes], bytes]) -> None:
    """The control of the search."""
    (tmp_path / "log").write_bytes(b"\xff " + encode(("a" * n_before + core + "\n").encode()) + b" more")
    (tmp_path / "other").write_text("cAnary")
    assert secrets.find_leaks(job.artifacts(tmp_path)) == [f"{tmp_path / 'log'} holds {core}"]


def test_the_run_of_a_hostile_job_is_as_any_other(hostile_job: tuple[Path, str]) -> None:
    root, printed = hostile_job
    state = json.loads((root / job.RUN / "state.json").read_text())
    assert (state["status"], state["step"]) == ("done", job.N_STEPS)
    assert "KeyError" in printed
    assert "-r token '[masked]'" in pages.read_page(root / job.REPORT).text
    nb = nbformat.read(root / job.NOTEBOOK, as_version=4)
    nbformat.validate(nb)
    assert nb.metadata.papermill.parameters.token == MASK
    assert f'token = "{MASK}"' in "".join(cell.source for cell in nb.cells)
    failed = json.loads((root / job.FAILING / "state.json").read_text())
    assert failed["message"].startswith("RuntimeError('no access with [masked] or [masked]')")


def test_the_report_of_a_hostile_job_runs_nothing(hostile_job: tuple[Path, str]) -> None:
    page = pages.read_page(hostile_job[0] / job.REPORT)
    assert page.wrong == []
    assert pages.count_marks(page) == len(pages.VECTORS)


def test_nothing_opens_the_network(hostile_job: tuple[Path, str]) -> None:
    log = (hostile_job[0].with_name("network.log")).read_text()
    # requests, which papermill imports, tries at its import whether a socket of this kind can be bound to ::1.
    assert [tried for tried in re.split("^REFUSED", log, flags=re.MULTILINE)[1:] if "_has_ipv6" not in tried] == []
    for program in (f"papermill {job.NAME}.ipynb", "ipykernel_launcher", "-m scripts.trainer"):
        assert any(line.startswith("RAN") and program in line for line in log.splitlines()), program

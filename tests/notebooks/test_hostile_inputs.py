"""Names, values and paths that mean harm, secrets that want out, pages that want to run, and no network."""

import ast
import base64
import json
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from papermill.engines import papermill_engines
from papermill.parameterize import parameterize_notebook

from hydra.errors import ConfigError, HydraError
from hydra.notebook.doors import guard_paths
from hydra.notebook.engine import BatchError, NotebookEngine
from hydra.notebook.parameters import assigned_parameters, check_names, resolve_run_dir
from hydra.notebook.plan import Plan, Request
from hydra.runtime import Run
from scripts.config import TrainingConfig

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


CORES = ("cAnaryEnv91", "cAnaryTok72", "cAnaryPwd53", "cAnaryLin34", "cAnaryPar15")
ENVIRONMENT = {
    "CANARY_API_KEY": f"""k-"{CORES[0]}'<b>&\\n/é+{{x}}""",
    "CANARY_TOKEN": f"ghp_{CORES[1]}0000",
    "CANARY_PASSWORD": f"first-{CORES[2]}\nsecond-{CORES[3]}",
}
PARAMETER = f"""p'"{CORES[4]}\\ü%s"""
CANARIES = (*ENVIRONMENT.values(), PARAMETER)
LEAKS = """
import base64, json, logging, os, sys, time
from urllib.parse import quote
from IPython.display import HTML, Latex, Markdown, SVG, display
os.environ["CANARY_OTHER"] = token
secrets = [token, *(os.environ[name] for name in ("CANARY_API_KEY", "CANARY_TOKEN", "CANARY_PASSWORD"))]
print(*secrets)
print(secrets, json.dumps(secrets), json.dumps(json.dumps(secrets)))
print(*(base64.b64encode(("x" * n + secret).encode()).decode() for n in range(3) for secret in secrets))
print(*(base64.urlsafe_b64encode(secret.encode()).decode() for secret in secrets), *map(quote, secrets))
print(secrets[2][:9], end="", flush=True)
print(secrets[2][9:], file=sys.stdout)
logging.getLogger().error("%s", secrets)
for kind in (HTML, Latex, Markdown):
    display(kind(f"<p title='{secrets[2]}'>{secrets[2]} {secrets[3]}</p>"))
display(SVG(f"<svg xmlns='http://www.w3.org/2000/svg'><text>{secrets[2]}</text></svg>"))
display({"text/plain": "a mapping", "application/json": {"secrets": secrets}}, raw=True, metadata={"secrets": secrets})
dict(secrets=secrets)
"""
RUNS = """
from hydra.notebook import read_parameters, run_directory, show_curves, watch
from scripts.config import TrainingConfig
from scripts.trainer import launch
parameters = read_parameters()
assert "token" not in parameters
run = launch(TrainingConfig.from_parameters(parameters), run_directory())
watch(run)
show_curves(run)
failing = launch(TrainingConfig.from_parameters({**parameters, "attention_options": {"fails": True}}), "runs/failing")
watch(failing)
"""


@pytest.fixture(scope="module")
def leaky_job(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path) -> tuple[Path, str]:
    """The workspace of a job that tells every secret in every way and ends by a traceback, and what it printed."""
    root = tmp_path_factory.mktemp("leaky")
    (root / "leaky_attention.py").write_text((HERE / "leaky_attention.py").read_text())
    notebook = as_notebook(
        LEAKS,
        RUNS,
        "run.raise_for_status()",
        "raise KeyError(f'{secrets[1]} {secrets[2]} {secrets[3]} {token}')",
        parameters="# Parameters: any\npreset = 'tiny'\ntoken = ''  # secret\n",
    )
    nbformat.write(notebook, root / "job.ipynb")
    values = {"corpus": str(corpus_dir), "attention": "leaky_attention.py:Leaky", "max_steps": 4, "threads": 1}
    arguments = [word for name, value in values.items() for word in ("-p", name, str(value))]
    command = [str(Path(sys.executable).parent / "papermill"), "job.ipynb", "runs/job/job.ipynb", "--engine", "hydra"]
    command += [
        *arguments,
        "-r",
        "token",
        PARAMETER,
        "--log-output",
        "--stdout-file",
        "out.txt",
        "--stderr-file",
        "err.txt",
    ]
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join([str(HERE / "no_network"), str(ROOT)]),
        "NETWORK_LOG": str(root.with_name("network.log")),
    }
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    return root, done.stdout + done.stderr


def spellings(secret: str) -> set[str]:
    """The base64 of the secret, at any place of a longer text: without the characters at both ends, which vary."""
    encoded = [base64.b64encode((before + secret).encode()).decode() for before in ("", "x", "xx")]
    return {text[4:-4] for text in encoded} | {text[4:-4].replace("+", "-").replace("/", "_") for text in encoded}


def test_no_secret_is_left_anywhere(leaky_job: tuple[Path, str]) -> None:
    root, printed = leaky_job
    needles = [*CORES, *(spelling for canary in CANARIES for spelling in spellings(canary))]
    files = [path for path in root.rglob("*") if path.is_file()]
    found = [
        (str(path.relative_to(root)), needle)
        for path in files
        for needle in needles
        if needle.encode() in path.read_bytes()
    ]
    assert found == []
    assert [needle for needle in needles if needle in printed] == []
    kinds = {path.name for path in files} | {path.suffix for path in files}
    assert kinds >= {
        "job.ipynb",
        "report.html",
        "trainer.log",
        "metrics.jsonl",
        "state.json",
        "out.txt",
        ".safetensors",
    }
    assert any(path.parent.name == "events" for path in files)


@pytest.mark.parametrize(
    "name",
    [
        "runs/job/job.ipynb",
        "runs/job/report.html",
        "runs/job/trainer.log",
        "runs/failing/trainer.log",
        "out.txt",
        "err.txt",
        "runs/failing/state.json",
    ],
)
def test_secrets_were_told_and_masked(leaky_job: tuple[Path, str], name: str) -> None:
    """The control: without masking each of these files would have held them."""
    assert "[masked]" in (leaky_job[0] / name).read_text()


def test_the_run_of_a_leaky_job_is_as_any_other(leaky_job: tuple[Path, str]) -> None:
    root, printed = leaky_job
    state = json.loads((root / "runs" / "job" / "state.json").read_text())
    assert (state["status"], state["step"]) == ("done", 4)
    assert "KeyError" in printed
    assert "-r token '[masked]'" in (root / "runs" / "job" / "report.html").read_text()
    nb = nbformat.read(root / "runs" / "job" / "job.ipynb", as_version=4)
    nbformat.validate(nb)
    assert nb.metadata.papermill.parameters.token == "[masked]"
    assert 'token = "[masked]"' in "".join(cell.source for cell in nb.cells)
    failed = json.loads((root / "runs" / "failing" / "state.json").read_text())
    assert failed["message"].startswith("RuntimeError('no access with [masked] or [masked]')")


def test_nothing_opens_the_network(leaky_job: tuple[Path, str]) -> None:
    log = (leaky_job[0].with_name("network.log")).read_text()
    # requests, which papermill imports, tries at its import whether a socket of this kind can be bound to ::1.
    assert [tried for tried in re.split("^REFUSED", log, flags=re.MULTILINE)[1:] if "_has_ipv6" not in tried] == []
    for program in ("papermill job.ipynb", "ipykernel_launcher", "-m scripts.trainer"):
        assert any(line.startswith("RAN") and program in line for line in log.splitlines()), program

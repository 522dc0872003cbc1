"""A notebook's parameters: which names it assigns, with which values, and where papermill's reading of `-p` misleads.

The cell tagged `parameters` begins with a comment line `# Parameters: ...`; the cell that papermill injects behind it
begins with the line `# Parameters` and nothing more. That is how a kernel, which sees no tags, tells them apart.
"""

import ast
import io
import keyword
import math
import os
import re
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Literal, Union

from hydra.errors import ConfigError
from hydra.runtime import paths, workspace_root
from hydra.runtime.processes import ENGINE_RUN_DIR, is_batch
from hydra.runtime.secrets import mark, texts_in

if TYPE_CHECKING:
    from nbformat import NotebookNode

DECLARED, INJECTED = "parameters", "injected-parameters"
COMMENT = "# Parameters"
RUN_DIR = "run_dir"
# Python takes other letters too, but reads some of them as if they were these.
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
SECRET = "# secret"
"""The comment behind an assignment in the parameters cell: the name is the notebook's own, its value is masked."""


def assigned_parameters(nb: "NotebookNode") -> dict[str, object]:
    """The names that the `parameters` cell and papermill's injected cell assign, with their values, last one winning.

    Raises:
        ConfigError: there are two `parameters` cells, the cell lacks its comment line, or a cell holds anything
            but assignments of plain values.
    """
    declared = [cell for cell in nb.cells if DECLARED in cell.metadata.get("tags", [])]
    if len(declared) > 1:
        raise ConfigError(f"a notebook must have one cell tagged `{DECLARED}`, but has {len(declared)}; merge them")
    for cell in declared:
        if _kind_of_cell(cell.source) != DECLARED:
            raise ConfigError(
                f"the cell tagged `{DECLARED}` must begin with a comment such as `{COMMENT}: what one may change`, "
                f"colon included, but begins with {cell.source.partition(chr(10))[0]!r}"
            )
    injected = [cell for cell in nb.cells if INJECTED in cell.metadata.get("tags", [])]
    values: dict[str, object] = {}
    for cell in declared + injected:
        values.update(_assignments(cell.source))
    return values


def secret_parameters(nb: "NotebookNode") -> tuple[set[str], set[str]]:
    """The names that the `parameters` cell marks as secret, and every text among the values that they are given.

    The cell must have passed `assigned_parameters`.
    """
    cells = [cell for cell in nb.cells if {DECLARED, INJECTED} & set(cell.metadata.get("tags", []))]
    names = {name for cell in cells if DECLARED in cell.metadata.tags for name in _marked_names(cell.source)}
    values = [value for cell in cells for name, value in _assignments(cell.source).items() if name in names]
    return names, texts_in(values)


def read_parameters() -> dict[str, object]:
    """The parameters of the notebook that calls this, in JupyterLab and under papermill alike.

    Without `run_dir`, and without those that the notebook marks as secret: no config has them.

    Names are those that the last executed parameters cell and injected cell assign; values are what they hold now.

    Raises:
        ConfigError: no parameters cell has been executed, or it holds anything but assignments of plain values.
    """
    values, secret = _executed_parameters()
    mark(texts_in([values[name] for name in secret]))
    return {name: value for name, value in values.items() if name != RUN_DIR and name not in secret}


def run_directory() -> Path:
    """The run directory of the notebook that calls this: the parameter `run_dir`, or runs/<name of the notebook>.

    Under papermill the engine has decided it before the kernel started.

    Raises:
        ConfigError: this front end does not tell the notebook's name, and there is no parameter `run_dir`.
    """
    if is_batch():
        return Path(os.environ[ENGINE_RUN_DIR])
    session = PurePath(os.environ.get("JPY_SESSION_NAME", ""))
    return resolve_run_dir(_executed_parameters()[0].get(RUN_DIR), session.stem if session.suffix == ".ipynb" else None)


def resolve_run_dir(given: object, notebook_name: str | None) -> Path:
    """The absolute run directory for the parameter `run_dir` (None: not given) of the notebook of that name.

    Raises:
        ConfigError: it is not a text, it is not given and the notebook has no name that a folder of `runs/` can have,
            or it leads out of where it may be.
    """
    if given is None:
        if notebook_name is None:
            raise ConfigError(
                f"the run needs a name, but the notebook's name is not known here; with papermill add --engine hydra, "
                f'elsewhere assign {RUN_DIR} in the parameters cell, as {RUN_DIR} = "runs/my-run"'
            )
        return _own_run_dir(notebook_name)
    if not isinstance(given, str) or not given.strip():
        raise ConfigError(
            f"{RUN_DIR} must be the path of a folder, but got {given!r} ({type(given).__name__}); "
            f"papermill's -p makes numbers of what looks like one: use -r {RUN_DIR} runs/my-run"
        )
    return _writable(paths.resolve_run_dir(given, RUN_DIR))


def _own_run_dir(notebook_name: str) -> Path:
    """runs/<name of the notebook>: a folder in `runs/`, whatever the name is."""
    run_dir = paths.resolve_run_dir(Path(paths.RUNS, notebook_name), RUN_DIR)
    if (run_dir.parent, run_dir.name) != ((workspace_root() / paths.RUNS).resolve(), notebook_name):
        raise ConfigError(
            f"a run that is named by its notebook must lie in {paths.RUNS}/, but {notebook_name!r} would be {run_dir}; "
            f"give another name: -r {RUN_DIR} runs/my-run"
        )
    return _writable(run_dir)


def _writable(run_dir: Path) -> Path:
    paths.check_folder(RUN_DIR, run_dir)
    return run_dir


def default_run_dir(notebook_name: str) -> str:
    """The run directory of a notebook whose parameters name none, relative to the workspace root."""
    return f"runs/{notebook_name}"


def check_names(names: Sequence[str]) -> None:
    """Return if each name can stand on the left of an assignment.

    Raises:
        ConfigError: one cannot. papermill writes names into the injected cell as they are, so that one may be code.
    """
    for name in names:
        if not NAME.fullmatch(name) or keyword.iskeyword(name):
            raise ConfigError(f"a parameter's name must be a plain Python name, but got {name!r}; it was not run")


def explain_traps(parameters: Mapping[str, object], field_types: Mapping[str, object]) -> dict[str, str]:
    """For each parameter whose value papermill may have read otherwise than it was meant: what happened, what to do.

    Args:
        parameters: values as papermill passed them.
        field_types: for each known name, the type that it must have (a type annotation).
    """
    hints = {
        name: _explain_trap(name, value, frozenset(_kinds(field_types[name])))
        for name, value in parameters.items()
        if name in field_types
    }
    return {name: hint for name, hint in hints.items() if hint}


def with_trap_hints(
    error: ConfigError, parameters: Mapping[str, object], field_types: Mapping[str, object]
) -> ConfigError:
    """The error with the traps of those parameters that it names explained behind it."""
    message = str(error)
    hints = explain_traps(parameters, field_types)
    return ConfigError("\n".join([message] + [hints[name] for name in hints if re.search(rf"\b{name}\b", message)]))


def _explain_trap(name: str, value: object, kinds: frozenset[type]) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if bool in kinds and not kinds & {str, type(value)}:
        return (
            f"  (papermill's -p reads only True and False as booleans; false, 0 or no stay text or numbers: "
            f"-p {name} True or -p {name} False. A numpy bool must be passed as bool(...))"
        )
    if isinstance(value, float) and not math.isfinite(value):
        if str in kinds:
            return f"  (papermill's -p takes a text such as 12e4567 for a number, {value}: pass it with -r {name} TEXT)"
        return f"  (papermill's -p reads inf, nan and what is too large for a float, as 12e4567, as {value}; text: -r)"
    if kinds == {str} and not isinstance(value, str):
        return (
            f"  (papermill's -p makes numbers of what looks like one (001 becomes 1), and of True, False and None: "
            f"pass text with -r {name} TEXT)"
        )
    if int in kinds and float not in kinds and is_number and not isinstance(value, int):
        return f"  (papermill's -p reads 1e3 and 5.0 as floats; write a whole number in digits: -p {name} 1000)"
    if isinstance(value, str) and kinds & {int, float} and str not in kinds and _is_number(value):
        return (
            f"  (it came as text, as papermill's -r passes it and as its API passes numpy values: "
            f"use -p {name} NUMBER, or int(...) or float(...))"
        )
    if not isinstance(value, list | dict) and kinds & {list, dict} and str not in kinds:
        example = f"{{{name}: {'{key: value}' if dict in kinds else '[a, b]'}}}"
        if not isinstance(value, str):
            return f"  (lists and mappings are given with -y '{example}')"
        return f"  (papermill's -p and -r pass lists and mappings as text: use -y '{example}')"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _kinds(annotation: object) -> Iterator[type]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        yield from _kinds(arguments[0])
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            yield from _kinds(argument)
    elif origin is Literal:
        yield from (type(argument) for argument in arguments)
    else:
        kind = origin or annotation
        assert isinstance(kind, type), annotation
        if issubclass(kind, Mapping):
            yield dict
        elif issubclass(kind, Sequence) and kind is not str:
            yield list
        else:
            yield kind


def _kind_of_cell(source: str) -> str | None:
    first = source.lstrip().partition("\n")[0].strip()
    if first == COMMENT:
        return INJECTED
    return DECLARED if first.startswith(f"{COMMENT}:") else None


def _executed_parameters() -> tuple[dict[str, object], set[str]]:
    """Values by name, and the names that are marked as secret."""
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    if shell is None:
        raise ConfigError("parameters can be read in a notebook only, but there is no IPython kernel here")
    declared = injected = ""
    for source in shell.user_ns["In"]:
        kind = _kind_of_cell(source)
        if kind == DECLARED:
            # What was injected stands behind this cell: run before it, it is of an earlier state of the notebook.
            declared, injected = source, ""
        elif kind == INJECTED:
            injected = source
    if not declared and not injected:
        raise ConfigError(
            f"the parameters cell must have been executed, but no executed cell begins with `{COMMENT}:`; that line is "
            "how the cell is found: keep it, and run the cell first"
        )
    values = {name: shell.user_ns[name] for source in (declared, injected) for name in _assignments(source)}
    return values, _marked_names(declared)


def _marked_names(source: str) -> set[str]:
    """The names whose assignment ends in the comment SECRET."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {token.start[0] for token in tokens if token.type == tokenize.COMMENT and token.string.strip() == SECRET}
    statements = [statement for statement in ast.parse(source).body if statement.end_lineno in lines]
    return {name for statement in statements for name in _assignment(statement)[0]}


def _assignments(source: str) -> dict[str, object]:
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ConfigError(
            f"a parameters cell must be Python, but its line {error.lineno} is not: {error.msg}"
        ) from None
    values: dict[str, object] = {}
    for statement in tree.body:
        try:
            names, value = _assignment(statement)
        except ValueError:
            raise ConfigError(
                "a parameters cell must hold only assignments of plain values (name = value), but holds "
                f"`{ast.unparse(statement)}`; compute what depends on parameters in a later cell"
            ) from None
        values.update(dict.fromkeys(names, value))
    return values


def _assignment(statement: ast.stmt) -> tuple[list[str], object]:
    """The names and the value of an assignment. Raises ValueError when it is none, or not of a plain value."""
    match statement:
        case ast.Assign(targets=targets, value=expression):
            pass
        case ast.AnnAssign(target=target, value=ast.expr() as expression):
            targets = [target]
        case _:
            raise ValueError(statement)
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    if len(names) != len(targets):
        raise ValueError(statement)
    return names, ast.literal_eval(_PapermillFloats().visit(expression))


class _PapermillFloats(ast.NodeTransformer):
    """papermill writes float('inf') and float('nan'), for which Python has no literal."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        match node:
            case ast.Call(
                func=ast.Name(id="float"), args=[ast.Constant(value="inf" | "-inf" | "nan" as text)], keywords=[]
            ):
                return ast.Constant(float(text))
        return node

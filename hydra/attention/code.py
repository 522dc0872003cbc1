"""A researcher's own attention class, in a file of its own. The one place where code is loaded by path. No torch here.

A class is named by its file, `path/to/my_attention.py:MyAttention`. The file is read without being run: its syntax tree
tells whether there is such a class, with `__init__(spec)` and `forward(x_BTD, positions_BT, document_ids_BT)` (names
are free), and which options it has. What is known of it then, its record, stands in configs and checkpoints. Its text
is run when a layer is built, and only if somebody vouched for its hash in this process: by naming the path
(`read_code`) or a folder of copies (`load_copies`).
"""

import ast
import dataclasses
import hashlib
import linecache
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.attention.spec import AttentionSpec, check_known
from hydra.errors import ConfigError, HydraError

NAME = re.compile(r"(?P<path>.+\.py):(?P<class_name>[^\W\d]\w*)")
FORWARD = ("x_BTD", "positions_BT", "document_ids_BT")
TAKES = "a class must define __init__(self, spec) and forward(self, x_BTD, positions_BT, document_ids_BT), by any names"
MODULE = "hydra_code_"
"""What names of modules made from such files begin with."""
# What code of a researcher may raise: everything that is a mistake in it, and nothing that ends a process.
MISTAKES = (
    ArithmeticError, AssertionError, AttributeError, HydraError, LookupError, MemoryError, NameError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip

Records = Mapping[str, Mapping[str, Any]]
"""By path: `sha256` of the file, and `options`: by class, the names of its options with their defaults."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CustomSpec(AttentionSpec):
    """What a researcher's class is told: widths, layer, and `options`."""

    name: str
    """The class as it was asked for, path:Class."""
    sha256: str
    """Of the file."""
    option_items: tuple[tuple[str, Any], ...]
    """Every option that the class has, with its value."""

    @property
    def options(self) -> dict[str, Any]:
        """Options by name: what was asked for, else the class's own default."""
        return dict(self.option_items)


_SOURCES: dict[str, tuple[Path, bytes]] = {}  # by hash: what somebody in this process vouched for
_MODULES: dict[str, types.ModuleType] = {}  # by hash: what of it has been run


def split_name(name: str) -> tuple[str, str] | None:
    """Path and class of `path.py:Class`; None for anything else, such as the name of a backend."""
    match = NAME.fullmatch(name)
    return None if match is None else (match["path"], match["class_name"])


def record_code(names: Iterable[str], known: Records, root: Path) -> dict[str, dict[str, Any]]:
    """Records of the files of those `names` that are classes by path.

    Args:
        names: backends and classes, as a plan has them.
        known: records that are taken as they are; only files and classes without one are read.
        root: where relative paths start.
    Raises:
        ConfigError: a file or class is not there, or not as it must be.
    """
    records: dict[str, dict[str, Any]] = {}
    for path, class_name in filter(None, map(split_name, names)):
        there = records.get(path) or dict(known.get(path, {}))
        if class_name not in there.get("options", {}):
            sha256, options = read_code(root / path, class_name)
            others = there["options"] if there.get("sha256") == sha256 else {}
            there = {"sha256": sha256, "options": {**others, class_name: options}}
        records[path] = there
    refuse_equal_names(records)
    return records


def refuse_equal_names(records: Records) -> None:
    """Return if every file that records name can stand in one folder; ConfigError for two of one name."""
    files: dict[str, str] = {}
    for path, record in records.items():
        if files.setdefault(Path(path).name, record["sha256"]) != record["sha256"]:
            raise ConfigError(
                f"files of attention classes must have names of their own, since a run keeps them in one folder, but "
                f"got several that are called {Path(path).name}; rename one"
            )


def read_code(path: Path, class_name: str) -> tuple[str, dict[str, Any]]:
    """Vouch for a file and read it, without running it: its SHA-256, and the options of the class with defaults.

    Raises:
        ConfigError: there is no such file or class, or it is not as TAKES says.
    """
    try:
        content = path.read_bytes()
        tree = ast.parse(content, str(path))
    except OSError as error:
        raise ConfigError(f"the file of an attention class must be readable, but {path}: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"the file of an attention class must be Python, but got in {path}: {error}") from None
    options = _check_class(tree, class_name, path)
    sha256 = hashlib.sha256(content).hexdigest()
    _SOURCES.setdefault(sha256, (path, content))
    return sha256, options


def write_copies(records: Records, directory: Path, write: Callable[[Path, bytes], None]) -> None:
    """Put the files that records name, as they were read in this process, into a run's folder of code.

    Args:
        write: writes a file whole or not at all: a part of one would be refused as another from then on.

    Raises:
        ConfigError: a file was not read here, or another of its name is there.
    """
    for path, record in records.items():
        copy = directory / Path(path).name
        content = _source_of(path, record["sha256"])[1]
        directory.mkdir(parents=True, exist_ok=True)
        if copy.exists() and copy.read_bytes() != content:
            raise ConfigError(f"a run's copy of {path} must be the file itself, but {copy} is another; remove it")
        write(copy, content)


def load_copies(records: Records, directory: Path) -> None:
    """Vouch for a run's own copies; from now on they are what runs in this process, wherever the originals are.

    Raises:
        ConfigError: one is missing, or is not what its record says.
    """
    for path, record in records.items():
        copy = directory / Path(path).name
        if not copy.is_file():
            raise ConfigError(f"a run must hold the code it was started with, but {copy} is missing; put it back")
        content = copy.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != record["sha256"]:
            raise ConfigError(
                f"a run's code must be what it was started with, but {copy} has SHA-256 {found} and the run's config "
                f"says {record['sha256']}; put it back as it was, or start a new run with the new code"
            )
        _SOURCES[found] = (copy, content)


def load_class(name: str, sha256: str) -> type:
    """The class itself; its file is run, once for each hash.

    Raises:
        ConfigError: nobody vouched for the file in this process, or it cannot be imported.
    """
    names = split_name(name)
    assert names is not None, name
    if sha256 not in _MODULES:
        path, content = _source_of(names[0], sha256)
        module = types.ModuleType(f"{MODULE}{sha256[:12]}_{path.stem}")
        module.__file__ = str(path)
        # What looks for its module by name, as dataclasses do, finds it; tracebacks show the text that was checked.
        sys.modules[module.__name__] = module
        text = content.decode()
        linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
        try:
            exec(compile(content, str(path), "exec"), module.__dict__)
        except ImportError as error:
            raise ConfigError(
                f"the file of an attention class must stand alone and import installed packages only, but {path} "
                f"says: {error}"
            ) from error
        except MISTAKES as error:
            raise ConfigError(
                f"the file of an attention class must run when it is imported, but {path} "
                f"{describe_mistake(error, module.__name__)}; correct it"
            ) from error
        _MODULES[sha256] = module
    found: type = getattr(_MODULES[sha256], names[1])
    return found


def describe_mistake(error: BaseException, module: str = MODULE) -> str:
    """An exception in one line, with the line of a researcher's module that it comes from.

    Args:
        module: what the name of that module begins with.
    """
    lines = str(error).strip().splitlines() or [""]
    place = place_of(error, module)
    return f"raises {type(error).__name__}: {lines[0][:160]}{'' if place is None else f', at {place}'}"


def place_of(error: BaseException, module: str = MODULE) -> str | None:
    """The last line of such a module that an exception went through, as file, number and text; None if none."""
    place = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).startswith(module):
            path = frame.f_code.co_filename
            place = f"{Path(path).name}:{line} `{linecache.getline(path, line).strip()}`"
    return place


def build_custom_spec(
    name: str, records: Records, *, d_model: int, n_heads: int, layer_index: int, n_layers: int, options: dict[str, Any]
) -> CustomSpec:
    """The spec of one layer, options checked against those that the class has.

    Raises:
        ConfigError: an unknown option (naming the closest), or a value of another type than its default.
    """
    defaults = custom_options(name, records)
    check_known("option", options, defaults)
    for option, value in options.items():
        kind = type(defaults[option])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ConfigError(
                f"{option} must be of type {kind.__name__}, as its default {defaults[option]!r} is, but got "
                f"{option}={value!r}; correct {option}"
            )
    names = split_name(name)
    assert names is not None, name
    return CustomSpec(
        d_model=d_model,
        n_heads=n_heads,
        layer_index=layer_index,
        n_layers=n_layers,
        name=name,
        sha256=records[names[0]]["sha256"],
        option_items=tuple({**defaults, **options}.items()),
    )


def custom_options(name: str, records: Records) -> dict[str, Any]:
    """Options of a class by path with their defaults, from its record."""
    names = split_name(name)
    assert names is not None, name
    path, class_name = names
    if class_name not in records.get(path, {}).get("options", {}):
        raise ConfigError(
            f"what was stored of {name} must hold the SHA-256 and options of that code in attention_code, but does "
            "not; start a new run from the file"
        )
    return dict(records[path]["options"][class_name])


def _source_of(path: str, sha256: str) -> tuple[Path, bytes]:
    if sha256 not in _SOURCES:
        raise ConfigError(
            f"code must be trusted by name before it runs, but nobody in this process named {path} with SHA-256 "
            f"{sha256}; read it, and if you trust who wrote it: Run.load_model(build_model, trust_code=True)"
        )
    return _SOURCES[sha256]


def _check_class(tree: ast.Module, class_name: str, path: Path) -> dict[str, Any]:
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    check_known(f"class of {path.name}", [class_name], classes)
    lineage = [classes[class_name]]
    for node in lineage:  # grows: bases that stand in the same file
        bases = (classes.get(base.id) for base in node.bases if isinstance(base, ast.Name))
        lineage += [base for base in bases if base is not None and base not in lineage]
    for method, parameters in (("__init__", ("spec",)), ("forward", FORWARD)):
        _check_method(lineage, method, parameters, f"{path}:{class_name}")
    for node in lineage:
        for statement in node.body:
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            if [target.id for target in targets if isinstance(target, ast.Name)] == ["options"]:
                return _read_options(statement, path)
    return {}


def _check_method(lineage: list[ast.ClassDef], method: str, parameters: tuple[str, ...], where: str) -> None:
    found = [
        statement
        for node in lineage
        for statement in node.body
        if isinstance(statement, ast.FunctionDef) and statement.name == method
    ]
    if not found:
        raise ConfigError(f"{TAKES}, but {where} has no {method}; add it")
    arguments = found[0].args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)][1:]
    needed = names[: len(names) - len(arguments.defaults)]
    more = [
        argument.arg
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if default is None
    ]
    # Names are free, since arguments are given by place; those of ours in other places tell of a wrong order.
    is_swapped = any(name in names and names.index(name) != place for place, name in enumerate(parameters))
    if len(names) < len(parameters) or len(needed) > len(parameters) or more or is_swapped:
        written = ast.unparse(arguments)
        raise ConfigError(f"{TAKES}, but line {found[0].lineno} of {where} is {method}({written}); correct it")


def _read_options(statement: ast.stmt, path: Path) -> dict[str, Any]:
    value = getattr(statement, "value", None)
    try:
        options = ast.literal_eval(value) if value is not None else None
    except ValueError:
        options = None
    plain = isinstance(options, dict) and all(
        isinstance(name, str) and name.isidentifier() and type(default) in (int, float, bool, str)
        for name, default in options.items()
    )
    if not plain:
        raise ConfigError(
            "the options of an attention class must be a mapping of names to a number, text or truth value, written "
            f"out, but line {statement.lineno} of {path} is {ast.unparse(statement)!r}; write for example "
            'options = {"window": 64}'
        )
    assert isinstance(options, dict)
    return options

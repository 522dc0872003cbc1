"""The paths in a papermill command, checked before papermill reads or writes them.

papermill fills `{name}` into them as Python formats text, attributes and all; takes a notebook's text for a path, `-`
for standard input, addresses for files; and writes wherever a path leads. With our engine a notebook is a file.
"""

import re
import string
import sys
from collections.abc import Mapping
from pathlib import Path

from hydra.errors import ConfigError
from hydra.notebook.endings import REJECTED, BatchError
from hydra.runtime.paths import resolve_inside

STANDARD_OUTPUT = "-"
SUFFIX = ".ipynb"
# What papermill itself offers to a path, beside the parameters: field and format, with a colon between them.
BUILT_IN = re.compile(r"pm\[run_uuid\]:|pm\[current_datetime_(local|utc)\]:(%[A-Za-z]|[-_.: ])*")


def fill_in(path: str, parameters: Mapping[str, object]) -> str:
    """The path with `{name}` replaced by that parameter, which must be a plain name of a file, or a number.

    Raises:
        ConfigError: the path asks for anything else, or the parameter is none that can stand in a path.
    """
    try:
        pieces = list(string.Formatter().parse(path))
    except ValueError as error:
        raise ConfigError(f"a path may hold {{name}} of a parameter, but got {path!r}: {error}") from None
    for _, field, form, conversion in pieces:
        if field is None or (BUILT_IN.fullmatch(f"{field}:{form}") and not conversion):
            continue
        if not field.isidentifier() or field not in parameters or form or conversion:
            raise ConfigError(
                f"a path may hold {{name}} of a parameter that is given, and nothing more of Python's formats, but got "
                f"{path!r}"
            )
        value = parameters[field]
        text = str(value)
        if type(value) not in (str, int, float) or "/" in text or text in ("", ".", "..") or not text.isprintable():
            raise ConfigError(
                f"a parameter in a path must be a number or a plain name, but {{{field}}} in {path!r} is {value!r}"
            )
    try:
        return path.format(**parameters)
    except (LookupError, TypeError, ValueError) as error:  # a parameter that is called pm
        raise ConfigError(f"a path may hold {{name}} of a parameter, but got {path!r}: {error}") from None


def check_input(path: str) -> None:
    """Return if the path names a notebook on this machine.

    Raises:
        ConfigError: it does not.
    """
    _check_notebook(path, "the notebook")
    if not Path(path).is_file():
        raise ConfigError(f"the notebook must be a file, but there is no {path}; correct the path")


def check_output(path: str) -> None:
    """Return if an executed notebook may be saved there: on standard output, or as a notebook on this machine.

    Raises:
        ConfigError: it may not.
    """
    if path == STANDARD_OUTPUT:
        return
    _check_notebook(path, "the output")
    if Path(path).is_dir():
        raise ConfigError(f"the output must be a file, but {path} is a folder; add the notebook's name")


def guard_paths(engine_name: str) -> None:
    """Let papermill ask us before it fills in, reads and writes the paths of a command for that engine."""
    from papermill import parameterize

    plain = parameterize.parameterize_path

    def parameterize_path(path: object, parameters: Mapping[str, object]) -> object:
        caller = sys._getframe(1)
        is_ours = caller.f_code.co_name == "execute_notebook" and caller.f_locals["engine_name"] == engine_name
        if not is_ours or not isinstance(path, str):
            return plain(path, parameters)
        try:
            filled = fill_in(path, parameters)
            # papermill asks for the one, then for the other.
            (check_input if path is caller.f_locals["input_path"] else check_output)(filled)
        except ConfigError as error:
            raise BatchError(str(error), REJECTED) from error
        return filled

    for module in (parameterize, sys.modules.get("papermill.execute")):
        if module is not None:
            module.parameterize_path = parameterize_path  # type: ignore[union-attr]


def _check_notebook(path: str, what: str) -> None:
    if path.startswith(STANDARD_OUTPUT):
        raise ConfigError(f"{what} must be a file, but papermill takes {path!r} for standard input or output; write ./")
    resolve_inside(path, Path.cwd(), what)
    if not path.endswith(SUFFIX):
        raise ConfigError(f"{what} must be a file whose name ends in {SUFFIX}, but got {path!r}")

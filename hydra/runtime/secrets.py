"""Secrets: values that nothing a run leaves may hold, found by names of environment variables or marked by the user.

A value is masked wherever text is written: log, records, notebook, report. So are its spellings in JSON, Python, HTML
and addresses, and its base64, alone or inside of more. The environment is the only list there is: it is read at every
call, and processes that are started inherit it.
"""

import base64
import functools
import html
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import TextIO, TypeVar
from urllib.parse import quote, quote_plus

from hydra.errors import ConfigError

NAMES = re.compile(r".*_KEY|.*_TOKEN|.*SECRET.*|.*PASSWORD.*", re.IGNORECASE)
# Names that look like those of secrets: what is public, and where something lies.
HARMLESS = re.compile(r"GPG_KEY|.*_PUBLIC_KEY|.*_(DIR|FILE|PATH)", re.IGNORECASE)
MARKED = "HYDRA_MARKED_SECRETS"
"""The environment variable that holds marked values, as a JSON list."""
MIN_CHARACTERS = 8
"""What is shorter stands in too many other words to be masked."""
MASK = "[masked]"

Value = TypeVar("Value")


def mark(values: Iterable[str]) -> None:
    """Mask these values too, from now on, in this process and in those that it starts."""
    os.environ[MARKED] = json.dumps(sorted({*_marked(), *values}))


def texts_in(value: object) -> set[str]:
    """Every text in a plain value (text, number, list, mapping), numbers as they are written."""
    if isinstance(value, Mapping):
        return texts_in(list(value.values()))
    if isinstance(value, list | tuple):
        return {text for item in value for text in texts_in(item)}
    return {str(value)}


def mask(text: str) -> str:
    """The text with MASK in place of every secret in it."""
    pattern = _pattern(_secrets())
    return pattern.sub(MASK, text) if pattern else text


def mask_texts(value: Value) -> Value:
    """A plain value with every text in it masked, and every number that is a secret.

    Names of mappings are left, so that it is read as before.
    """
    secrets = _secrets()
    pattern = _pattern(secrets)
    return value if pattern is None else _mask_inside(value, pattern, secrets)  # type: ignore[return-value]


def n_begun(text: str) -> int:
    """Characters at the end of the text with which a secret begins."""
    lengths = (n for secret in _secrets() for n in range(1, len(secret)) if text.endswith(secret[:n]))
    return max(lengths, default=0)


class MaskedStream(io.TextIOBase):
    """A text stream, masked line by line: a secret that is written in pieces is masked as a whole."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._line = ""

    def write(self, text: str) -> int:
        """Write the lines that are complete; keep the rest."""
        lines, newline, self._line = (self._line + text).rpartition("\n")
        self._stream.write(mask(lines + newline))
        return len(text)

    def flush(self) -> None:
        """Write what there is of the last line too, but for an end with which a secret may begin."""
        shown = len(self._line) - n_begun(self._line)
        self._stream.write(mask(self._line[:shown]))
        self._line = self._line[shown:]
        self._stream.flush()

    def fileno(self) -> int:
        """Of the stream itself: who writes there writes unmasked."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Whether somebody reads along."""
        return self._stream.isatty()


def refuse_secrets(values: Mapping[str, object]) -> None:
    """Return if none of the values, by name, holds a secret: a run stores them as they are, and shows them.

    Raises:
        ConfigError: naming the value, and where the secret comes from.
    """
    for name, value in values.items():
        for source, secret in [*_named().items(), *(("a parameter marked as secret", one) for one in _marked())]:
            if len(secret) >= MIN_CHARACTERS and any(secret in text for text in texts_in(value)):
                raise ConfigError(
                    f"what a run stores and shows must hold no secret, but {name} holds the value of {source}; give "
                    f"{name} another value"
                )


def is_secret(name: str, value: str) -> bool:
    """Whether an environment variable holds a secret, by its name; the path of something that exists is none."""
    is_named = NAMES.fullmatch(name) and not HARMLESS.fullmatch(name)
    return bool(is_named) and name != MARKED and not os.path.exists(value)  # noqa: PTH110 (a Path may not hold all that a value may)


def _named() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if is_secret(name, value)}


def _marked() -> list[str]:
    values: list[str] = json.loads(os.environ.get(MARKED, "[]"))
    return values


def _secrets() -> frozenset[str]:
    """Values, and the lines of those that have several, that are long enough to be masked."""
    lines = (line.strip() for value in [*_named().values(), *_marked()] for line in (value, *value.splitlines()))
    return frozenset(line for line in lines if len(line) >= MIN_CHARACTERS)


def _mask_inside(value: object, pattern: re.Pattern[str], secrets: frozenset[str]) -> object:
    match value:
        case str():
            return pattern.sub(MASK, value)
        case Mapping():
            return {name: _mask_inside(item, pattern, secrets) for name, item in value.items()}
        case list() | tuple():
            return [_mask_inside(item, pattern, secrets) for item in value]
        case int() | float() if str(value) in secrets:
            return MASK
    return value


@functools.lru_cache(maxsize=8)
def _pattern(secrets: frozenset[str]) -> re.Pattern[str] | None:
    spellings = {spelling for secret in secrets for spelling in _spellings(secret)}
    # The longest first: where one spelling begins as another does, all of it goes.
    return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True)))) if spellings else None


def _spellings(secret: str) -> set[str]:
    escaped = {secret}
    for _ in range(2):  # a Python literal may stand in a JSON text, as in a notebook
        escaped |= {spelling for text in escaped for spelling in _escape(text)}
    content = secret.encode(errors="surrogateescape")
    on_pages = {
        html.escape(secret),
        html.escape(secret, quote=False),
        quote(content),
        quote(content, ""),
        quote_plus(content),
    }
    return escaped | on_pages | _in_base64(content)


def _escape(text: str) -> set[str]:
    """How JSON, Python and papermill write the text between quotes."""
    papermill = text.encode("unicode_escape", errors="surrogatepass").decode().replace('"', r"\"")
    return {json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], repr(text)[1:-1], papermill}


def _in_base64(secret: bytes) -> set[str]:
    """The characters of base64 that the bytes alone decide, for each of three places at which they may begin."""
    found = set()
    for n_before in range(3):
        encoded = base64.b64encode(bytes(n_before) + secret).decode()
        own = encoded[-(-n_before * 8 // 6) : (n_before + len(secret)) * 8 // 6]
        found |= {own, own.replace("+", "-").replace("/", "_")}
    return found

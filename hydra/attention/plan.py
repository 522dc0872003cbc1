"""Layer plans: which attention stands in which block, written as text. No torch in this file.

gqa                             the same in every block
3*ccgqa, gqa                    three of the one, then one of the other, and so on to the last block
3*gqa(window=256), gqa          with options of their own
my.py:Mine, gqa                 a class in a file of one's own; see hydra.attention.code
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.attention.code import Records, build_custom_spec, custom_options, record_code, split_name
from hydra.attention.registry import available_backends, load_spec_class
from hydra.attention.spec import AttentionSpec, check_int, check_known
from hydra.errors import ConfigError

ENTRY = re.compile(r"(?:(?P<count>-?\d+)\s*\*\s*)?(?P<name>[^\s*(),=]+)\s*(?:\((?P<options>[^()]*)\))?")
OPTION = re.compile(r"(?P<name>\w+)\s*=\s*(?P<value>[^\s=]+)")
NO_CODE: Records = {}
TRUTHS = {"True": True, "true": True, "False": False, "false": False}


@dataclasses.dataclass(frozen=True)
class PlannedLayer:
    """The attention of one block."""

    name: str
    """Of a backend, or path:Class."""
    options: Mapping[str, Any]
    """Of that backend, as they were asked for."""
    spec: AttentionSpec
    """What they come to, checked."""


def plan_layers(
    attention: str, *, d_model: int, n_heads: int, n_layers: int, options: Mapping[str, Any], code: Records = NO_CODE
) -> list[PlannedLayer]:
    """The attention of each of n_layers blocks; the plan is repeated until there are enough.

    Args:
        attention: a plan, as above.
        options: for every layer whose backend has an option of that name; those in brackets come first.
        code: records of the classes by path, from record_plan_code.
    Raises:
        ConfigError: text that is no plan, an unknown backend or option (naming the closest known one), an option that
            no layer of the plan has, an entry that no block is left for, a value that cannot be.
    """
    check_int("n_layers", n_layers)
    entries = parse_plan(attention)
    names = list(dict.fromkeys(name for name, _ in entries))
    known = {name: _option_names(name, code) for name in names}
    every_option = list(dict.fromkeys(option for name in names for option in known[name]))
    check_known("option", options, every_option)
    if len(entries) > n_layers:
        raise ConfigError(
            f"a plan must have at most n_layers={n_layers} layers, but got {len(entries)} in {attention!r}; "
            "raise n_layers or shorten the plan"
        )
    layers = []
    for layer_index in range(n_layers):
        name, own = entries[layer_index % len(entries)]
        asked = {**{option: value for option, value in options.items() if option in known[name]}, **own}
        spec = build_spec(
            name,
            code,
            d_model=d_model,
            n_heads=n_heads,
            layer_index=layer_index,
            n_layers=n_layers,
            options=asked,
        )
        layers.append(PlannedLayer(name, asked, spec))
    return layers


def build_spec(name: str, code: Records = NO_CODE, **fields: Any) -> AttentionSpec:
    """The spec of one layer, of a backend or a class by path; see AttentionSpec.from_options for fields and errors."""
    if split_name(name):
        return build_custom_spec(name, code, **fields)
    return load_spec_class(name).from_options(**fields)


def record_plan_code(attention: str, known: Records, root: Path) -> dict[str, dict[str, Any]]:
    """Records of the files that a plan's classes by path stand in; see record_code."""
    return record_code([name for name, _ in parse_plan(attention)], known, root)


def refuse_missing_records(attention: str, code: Records) -> None:
    """Return if a stored plan comes with the records of its code: what somebody stored may not name other files here.

    Raises:
        ConfigError: naming a class without a record.
    """
    for name, _ in parse_plan(attention):
        if split_name(name):
            custom_options(name, code)


def _option_names(name: str, code: Records) -> list[str]:
    return list(custom_options(name, code)) if split_name(name) else load_spec_class(name).option_names()


def parse_plan(attention: str) -> list[tuple[str, dict[str, Any]]]:
    """Backend and bracketed options of each layer of a plan, once; see plan_layers for errors."""
    if not isinstance(attention, str):
        raise ConfigError(f"attention must be text, but got {attention!r}")
    layers: list[tuple[str, dict[str, Any]]] = []
    if attention.count("(") != attention.count(")"):
        raise ConfigError(
            f"brackets in a plan must be opened and closed, but got {attention!r}; write for example gqa(window=256)"
        )
    texts = [text.strip() for text in re.split(r",(?![^(]*\))", attention)]
    for place, text in enumerate(texts, start=1):
        if not text and len(texts) > 1:
            raise ConfigError(
                f"a plan must have an attention on both sides of a comma, but entry {place} of {attention!r} is empty; "
                "remove the comma"
            )
        entry = ENTRY.fullmatch(text)
        if entry is None:
            raise ConfigError(
                f"attention must be a backend or a plan such as '3*ccgqa, gqa' or '3*gqa(window=256), gqa', but got "
                f"{text!r} in {attention!r}; the backends are {', '.join(available_backends())}; a class of your own "
                "is path/to/file.py:Class (no spaces in it)"
            )
        count = 1 if entry["count"] is None else int(entry["count"])
        if count < 1:
            raise ConfigError(f"a count in a plan must be at least 1, but got {text!r} in {attention!r}; correct it")
        layers += [(entry["name"], _parse_options(entry["options"] or "", attention))] * count
    return layers


def _parse_options(text: str, attention: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        option = OPTION.fullmatch(part)
        if option is None or option["name"] in options:
            raise ConfigError(
                f"options in a plan must be name=value, each once, but got {part!r} in {attention!r}; "
                "write for example gqa(window=256, qk_norm=True)"
            )
        options[option["name"]] = _parse_value(option["value"])
    return options


def _parse_value(text: str) -> int | float | bool | str:
    if text in TRUTHS:
        return TRUTHS[text]
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text

"""Layer plans: what their text means, and what is refused."""

from typing import Any

import pytest

from hydra.attention import plan_layers
from hydra.errors import ConfigError


def plan(attention: str, n_layers: int = 4, **options: Any) -> list[tuple[str, dict[str, Any]]]:
    layers = plan_layers(attention, d_model=32, n_heads=8, n_layers=n_layers, options=options)
    assert [layer.spec.layer_index for layer in layers] == list(range(n_layers))
    assert {layer.spec.n_layers for layer in layers} == {n_layers}
    for layer in layers:
        assert {name: getattr(layer.spec, name) for name in layer.options} == layer.options
    return [(layer.name, dict(layer.options)) for layer in layers]


def test_one_backend_stands_everywhere() -> None:
    assert plan("gqa", n_kv_heads=2) == [("gqa", {"n_kv_heads": 2})] * 4


def test_a_plan_is_repeated_to_the_last_block() -> None:
    names = [name for name, _ in plan("2*ccgqa, gqa", n_layers=8)]
    assert names == ["ccgqa", "ccgqa", "gqa", "ccgqa", "ccgqa", "gqa", "ccgqa", "ccgqa"]


def test_brackets_come_before_options_for_all_who_have_them() -> None:
    layers = plan(" 3 * gqa( window=256 , qk_norm=True ),ccgqa ", rope_base=500.0, window=8, conv_kernel_0=3)
    assert layers[0] == ("gqa", {"rope_base": 500.0, "window": 256, "qk_norm": True})
    assert layers[3] == ("ccgqa", {"rope_base": 500.0, "conv_kernel_0": 3})


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        ("gpa", {}, "did you mean 'gqa'"),
        ("3*gqa, cqgqa", {}, "did you mean 'ccgqa'"),
        ("gqa, gqa(windov=3)", {}, "did you mean 'window'"),
        ("gqa, ccgqa", {"windov": 3}, "did you mean 'window'"),
        ("gqa", {"conv_kernel_0": 3}, "option must be one of n_kv_heads"),
        ("5*gqa", {}, "at most n_layers=4 layers, but got 5"),
        ("0*gqa", {}, r"a count in a plan must be at least 1, but got '0\*gqa'"),
        ("gqa, -2*mla", {}, r"a count in a plan must be at least 1, but got '-2\*mla' in"),
        ("", {}, "backend or a plan"),
        ("gqa,", {}, "entry 2 of 'gqa,' is empty; remove the comma"),
        ("2*lightning,,gqa", {}, "both sides of a comma, but entry 2 of .* is empty"),
        ("gqa(window=3", {}, r"brackets in a plan must be opened and closed, but got 'gqa\(window=3'"),
        ("gqa, gqa window=3)", {}, "brackets in a plan must be opened and closed"),
        ("foo", {}, "one of ccgqa, gqa, .*a class of your own is path.py:Class"),
        (
            "my_attention.py",
            {},
            "with its file, path.py:Class, but got attention='my_attention.py'; write my_attention.py:My",
        ),
        ("my_attention.py:", {}, "with its file, path.py:Class, but got .*; write my_attention.py:My"),
        ("gqa window=3", {}, "backend or a plan"),
        ("gqa(window)", {}, "must be name=value"),
        ("gqa(window=3, window=4)", {}, "each once"),
        ("gqa(window=wide)", {}, "window must be an integer of at least 0, but got window='wide'"),
        ("gqa(window=-1)", {}, "window must be an integer of at least 0"),
        (["gqa"], {}, "attention must be text"),
    ],
)
def test_what_is_no_plan_is_refused(attention: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(attention, **options)

from typing import Any

import pytest

from hydra.attention import check_options
from hydra.attention.backends.ccgqa.spec import CCGQASpec
from hydra.attention.backends.gqa.spec import GQASpec
from hydra.attention.backends.mla.spec import MLASpec
from hydra.attention.registry import load_spec_class
from hydra.attention.spec import AttentionSpec
from hydra.errors import ConfigError


def make(name: str, n_heads: int, d_model: int | None = None, **options: Any) -> AttentionSpec:
    return load_spec_class(name).from_options(
        d_model=n_heads * 4 if d_model is None else d_model, n_heads=n_heads, layer_index=0, n_layers=1, options=options
    )


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(1, 1), (2, 1), (4, 1), (8, 2), (12, 3), (16, 4), (9, 1), (14, 2)])
def test_gqa_defaults(n_heads: int, n_kv_heads: int) -> None:
    """A quarter, at least 1, rounded down to a divisor where a quarter is none."""
    spec = make("gqa", n_heads)
    assert isinstance(spec, GQASpec)
    assert (spec.n_kv_heads, spec.rope_base) == (n_kv_heads, 10000.0)


@pytest.mark.parametrize(
    ("n_heads", "n_query_heads", "n_kv_heads"), [(1, 1, 1), (4, 2, 1), (8, 4, 1), (16, 8, 2), (28, 14, 2), (48, 24, 6)]
)
def test_ccgqa_defaults(n_heads: int, n_query_heads: int, n_kv_heads: int) -> None:
    spec = make("ccgqa", n_heads)
    assert isinstance(spec, CCGQASpec)
    assert (spec.n_query_heads, spec.n_kv_heads) == (n_query_heads, n_kv_heads)
    assert (spec.conv_kernel_0, spec.conv_kernel_1, spec.rope_base, spec.rotary_fraction) == (2, 2, 10000.0, 1.0)


@pytest.mark.parametrize(
    ("d_model", "n_heads", "latent", "rotary", "head"),
    [(2048, 16, 512, 64, 128), (7168, 128, 224, 28, 56), (64, 2, 64, 16, 32), (24, 4, 24, 2, 6), (8, 8, 4, 2, 1)],
)
def test_mla_defaults(d_model: int, n_heads: int, latent: int, rotary: int, head: int) -> None:
    """The proportions of DeepSeek-V2-Lite (first row), even rotated channels, a latent never wider than the input."""
    spec = make("mla", n_heads, d_model)
    assert isinstance(spec, MLASpec)
    assert (spec.kv_latent_width, spec.q_latent_width, spec.rotary_width) == (latent, 0, rotary)
    assert (spec.nope_width, spec.value_width, spec.rope_base) == (head, head, 10000.0)


def test_defaults_follow_the_options_that_were_given() -> None:
    spec = make("ccgqa", 16, n_query_heads=3)
    assert isinstance(spec, CCGQASpec)
    assert spec.n_kv_heads == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "gqa",
            {"n_kv_heads": 3},
            "n_kv_heads must divide n_heads, but got n_kv_heads=3 and n_heads=8; try n_kv_heads=2",
        ),
        ("gqa", {"n_kv_heads": True}, "n_kv_heads must be an integer of at least 1, but got n_kv_heads=True"),
        ("gqa", {"n_kv_heads": 2.0}, "n_kv_heads must be an integer"),
        ("gqa", {"rope_base": 1}, "rope_base must be a finite number above 1.0, but got rope_base=1"),
        ("gqa", {"rope_base": float("inf")}, "rope_base must be a finite number"),
        ("gqa", {"qk_norms": True}, "option must be one of n_kv_heads, .*window, but got option='qk_norms'"),
        ("ccgqa", {"n_query_heads": 3, "n_kv_heads": 2}, "n_kv_heads must divide n_query_heads"),
        ("ccgqa", {"n_query_heads": "4"}, "n_query_heads must be an integer"),
        ("ccgqa", {"conv_kernel_1": 0}, "conv_kernel_1 must be an integer of at least 1"),
        ("ccgqa", {"conv_kernel": 3}, "did you mean 'conv_kernel_"),
        ("ccgqa", {"rotary_fraction": 1.5}, "rotary_fraction must be a finite number above 0.0 and at most 1.0"),
        ("ccgqa", {"rotary_fraction": 0.3}, "rotary_fraction must leave an even number of rotated channels"),
        ("mla", {"rotary_width": 3}, "rotary_width must be even, but got rotary_width=3; try 4"),
        ("mla", {"kv_latent_width": 0}, "kv_latent_width must be an integer of at least 1"),
        ("mla", {"nope_width": 0}, "nope_width must be an integer of at least 1"),
        ("mla", {"q_latent_width": -1}, "q_latent_width must be an integer of at least 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(name, 32, 8, options)


def test_shapes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="d_model / n_heads must be even for the rotary embedding"):
        make("gqa", 4, d_model=12)
    with pytest.raises(ConfigError, match="must be even for the value shift"):
        make("ccgqa", 4, d_model=12)
    with pytest.raises(ConfigError, match="n_heads must be an integer"):
        check_options("gqa", 32, 8.0, {})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="layer_index must be below n_layers=2"):
        GQASpec.from_options(d_model=32, n_heads=4, layer_index=2, n_layers=2, options={})

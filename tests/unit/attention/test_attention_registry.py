import subprocess
import sys

import pytest

from hydra.attention import available_backends, build_attention, check_options
from hydra.attention.registry import BACKENDS, load_layer_class, load_spec_class
from hydra.errors import ConfigError


def test_every_backend_loads_and_has_a_public_shim() -> None:
    for name in available_backends():
        module = __import__(f"hydra.attention.{name}", fromlist=["__all__"])
        assert {load_spec_class(name).__name__, load_layer_class(name).__name__} <= set(module.__all__)
        assert getattr(module, BACKENDS[name].layer_class) is load_layer_class(name)


def test_an_unknown_backend_lists_the_known_ones_and_the_closest() -> None:
    message = r"attention must be one of ccgqa, gqa, lightning, mla, but got attention='ccqga'; did you mean 'ccgqa'\?"
    for refused in (
        lambda: check_options("ccqga", 64, 8, {}),
        lambda: build_attention("ccqga", d_model=64, n_heads=8),
        lambda: load_layer_class("ccqga"),
    ):
        with pytest.raises(ConfigError, match=message):
            refused()


def test_options_are_checked_without_torch() -> None:
    code = (
        "import sys\n"
        "from hydra.attention import available_backends, check_options\n"
        "for name in available_backends():\n"
        "    check_options(name, 64, 8, {})\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_old_import_path_warns_and_gives_the_same_classes() -> None:
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import hydra.model.ccgqa as old\n"
        "import hydra.attention.ccgqa as new\n"
        "assert [w.category for w in caught if 'hydra.attention.ccgqa' in str(w.message)] == [DeprecationWarning]\n"
        "assert all(getattr(old, name) is getattr(new, name) for name in new.__all__)\n"
        "assert old.__all__ == new.__all__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""Every test here runs Triton kernels on the CPU, by Triton's interpreter: one program after the other, in numpy.

Its arithmetic is exact in float32 and float16, and wrong in bfloat16 (triton 3.9). A process has either the interpreter
or the compiler, from the import of triton on; this file is imported when tests are collected, before anything needs it.
"""

import importlib
import os
import sys
from pathlib import Path

import pytest

from hydra.kernels.dispatch import is_triton_installed

ROOT = Path(__file__).parents[2]


def import_interpreted() -> None:
    """Import triton, and all kernels, as the interpreter; processes that tests start are not told."""
    assert "triton" not in sys.modules, "triton must not be imported before these tests are collected"
    os.environ["TRITON_INTERPRET"] = "1"
    triton = importlib.import_module("triton")
    for path in sorted((ROOT / "hydra").rglob("_triton/[a-z]*.py")):
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    del os.environ["TRITON_INTERPRET"]
    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True


if is_triton_installed():
    import_interpreted()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and not is_triton_installed():
            item.add_marker(pytest.mark.skip(reason="triton is not installed"))

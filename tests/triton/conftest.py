"""Every test here runs Triton kernels on the CPU, by Triton's interpreter: one program after the other, in numpy.

Its arithmetic is exact in float32 and float16, and wrong in bfloat16 (triton 3.9). A process has either the interpreter
or the compiler, from the import of triton on: tests/conftest.py imports it, before any test module can.
"""

from pathlib import Path

import pytest

from hydra.kernels.dispatch import is_triton_installed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and not is_triton_installed():
            item.add_marker(pytest.mark.skip(reason="triton is not installed"))

"""Every kernel compiles for every generation without spilling, and the program that says so can say no."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hydra.kernels.dispatch import is_triton_installed

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(not is_triton_installed(), reason="triton is not installed")


def test_every_kernel_compiles_and_the_readme_lists_it() -> None:
    command = [sys.executable, "-m", "diagnostics.triton_aot", "check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [line.split("|")[1:4] for line in done.stdout.splitlines() if line.startswith("|")]
    readme = (ROOT / "hydra" / "kernels" / "README.md").read_text()
    listed = [line.split("|")[1:4] for line in readme.partition("<!-- table: begin -->")[2].splitlines() if "|" in line]
    assert cases == listed, "run python -m diagnostics.triton_aot"
    assert len(cases) > 20


PLANTED = """
import triton
import triton.language as tl
from hydra.kernels._triton.launch import AotCase

@triton.jit
def greedy_kernel(x_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    total = tl.sum(x, axis=0)
    tl.store(x_ptr + at, x / total)

@triton.jit
def dot_kernel(x_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(x_ptr + at, tl.dot(x, x).to(tl.float16))

def aot_cases():
    x = {"x_ptr": "*fp32"}
    return [
        AotCase(greedy_kernel, x, {"N": 16384}, 1),
        AotCase(greedy_kernel, x, {"N": 1024}, 4, instruction="dot"),
        AotCase(dot_kernel, {"x_ptr": "*fp16"}, {"N": 64}, 4),
        AotCase(dot_kernel, {"x_ptr": "*fp16"}, {"N": 64}, 4, instruction="dot"),
        AotCase(greedy_kernel, {}, {"N": 1024}, 4),
    ]
"""


def test_what_must_be_refused_is(tmp_path: Path) -> None:
    """Spilled registers, a missing matrix instruction, one too many, a case that is no launch; and one that is well."""
    (tmp_path / "planted.py").write_text(PLANTED)
    code = textwrap.dedent("""
        from diagnostics.triton_aot import compile_case
        print([compile_case("planted", index, 90).problems for index in range(5)])
        print(compile_case("planted", 3, 90).instructions, compile_case("planted", 3, 86).instructions)
    """)
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    problems, instructions = done.stdout.splitlines()
    spilled, missing, unexpected, fine, no_launch = eval(problems)
    assert any("STACK" in problem for problem in spilled)
    assert missing == ("wgmma.mma_async expected, found none",)
    assert unexpected[0].startswith("no matrix instruction expected")
    assert fine == ()
    assert "named once only" in no_launch[0]
    assert instructions == "('wgmma.mma_async',) ('mma.sync',)"

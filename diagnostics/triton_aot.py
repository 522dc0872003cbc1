"""Do all Triton kernels compile for every NVIDIA generation, without spilling? No GPU is needed.

    python -m diagnostics.triton_aot          compile, print the table, write it into hydra/kernels/README.md
    python -m diagnostics.triton_aot check    compile and print

Every case that a module `hydra/**/_triton/<op>.py` lists in `aot_cases()` is compiled for every chip of CHIPS by the
compiler in the triton wheel. Refused are: a byte of stack or local memory (what spilled registers leave), more shared
memory than a block may have, and a matrix instruction that is missing or of another generation. Exit status: 0
all is well, 1 something was refused, 2 triton is not there.
"""

import importlib
import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "hydra" / "kernels" / "README.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
N_PROCESSES = 2


@dataclass(frozen=True)
class Chip:
    """What a block of a generation may have, and its best matrix instruction as PTX names it."""

    shared_bytes: int
    """CUDA C programming guide, table of technical specifications: maximum shared memory per thread block."""
    instruction: str


CHIPS = {
    80: Chip(163 * 1024, "mma.sync"),
    86: Chip(99 * 1024, "mma.sync"),
    89: Chip(99 * 1024, "mma.sync"),
    90: Chip(227 * 1024, "wgmma.mma_async"),
    100: Chip(227 * 1024, "tcgen05.mma"),
    120: Chip(99 * 1024, "mma.sync"),
}
MATRIX_INSTRUCTION = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")


@dataclass(frozen=True)
class Result:
    """One kernel in one form for one chip."""

    registers: int
    shared_bytes: int
    instructions: tuple[str, ...]
    problems: tuple[str, ...]


def find_modules() -> list[str]:
    """Modules with cases, by name, sorted."""
    paths = sorted(path for path in (ROOT / "hydra").rglob("_triton/*.py") if "def aot_cases(" in path.read_text())
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]


def compile_case(module: str, index: int, capability: int) -> Result:
    """Compile a module's case of this index for a chip, and measure what came out."""
    case = importlib.import_module(module).aot_cases()[index]
    try:
        compiled = build(case, capability)
    except Exception as error:  # noqa: BLE001
        # Whatever the compiler dies of belongs into the table beside the other results.
        return Result(0, 0, (), (f"{type(error).__name__}: {error}".splitlines()[0],))
    usage = read_resource_usage(compiled.asm["cubin"])
    shared_bytes = int(compiled.metadata.shared)
    instructions = tuple(sorted(set(MATRIX_INSTRUCTION.findall(compiled.asm["ptx"]))))

    chip, problems = CHIPS[capability], []
    problems += [f"{name} {usage[name]} bytes" for name in ("STACK", "LOCAL") if usage[name]]
    if shared_bytes > chip.shared_bytes:
        problems.append(f"shared {shared_bytes} of {chip.shared_bytes} bytes")
    expected = chip.instruction if case.instruction == "dot" else case.instruction
    if expected is None and instructions:
        problems.append(f"no matrix instruction expected, found {instructions}")
    if expected is not None and expected not in instructions:
        problems.append(f"{expected} expected, found {instructions or 'none'}")
    return Result(usage["REG"], shared_bytes, instructions, tuple(problems))


def build(case: Any, capability: int) -> Any:
    """What a launch with the case's arguments would compile on a chip of this capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    missing = set(names) ^ (set(case.arguments) | set(case.constants))
    assert not missing, f"{case.kernel.__name__}, {case.label}: arguments {sorted(missing)} are named once only"
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(names):
        value = case.arguments.get(name)
        if name in case.constants or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[(position,)] = case.constants.get(name, value)
            continue
        signature[name] = value if isinstance(value, str) else "i32" if abs(value) < 2**31 else "i64"
        if str(value).startswith("*") or (isinstance(value, int) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constants, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def read_resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of the one kernel in a cubin, by the cuobjdump of the triton wheel."""
    from triton.backends import nvidia

    cuobjdump = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def compile_all() -> dict[tuple[str, str, str], dict[int, Result]]:
    """Results by (module, kernel, label) and chip, compiled by N_PROCESSES processes."""
    names, tasks = [], []
    for module in find_modules():
        for index, case in enumerate(importlib.import_module(module).aot_cases()):
            for capability in CHIPS:
                names.append((module, case.kernel.__name__, case.label))
                tasks.append((module, index, capability))
    # Not forked: a process that has imported torch has threads.
    with multiprocessing.get_context("spawn").Pool(N_PROCESSES) as pool:
        results = pool.starmap(compile_case, tasks, chunksize=1)
    found: dict[tuple[str, str, str], dict[int, Result]] = {}
    for name, (_, _, capability), result in zip(names, tasks, results, strict=True):
        found.setdefault(name, {})[capability] = result
    return found


def draw_table(found: dict[tuple[str, str, str], dict[int, Result]]) -> str:
    """Markdown: a row for each case; for each chip registers of a thread, shared KiB of a block, matrix instruction."""
    import torch
    import triton

    heads = " | ".join(f"sm_{capability}" for capability in CHIPS)
    lines = [
        f"triton {triton.__version__}, torch {torch.__version__.partition('+')[0]}. For each chip: registers of a "
        "thread / KiB of shared memory of a block, and matrix instructions. Stack and local memory are 0 everywhere.",
        "",
        f"| operator | kernel | case | {heads} |",
        f"|---|---|---|{'---|' * len(CHIPS)}",
    ]
    for (module, kernel, label), results in found.items():
        cells = []
        for result in results.values():
            cell = f"{result.registers} / {result.shared_bytes / 1024:.4g}"
            cell += "".join(f" {name.partition('.')[0]}" for name in result.instructions)
            cells.append(cell if not result.problems else "**" + "; ".join(result.problems).replace("|", "/") + "**")
        lines.append(f"| {module.rpartition('.')[2]} | {kernel} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """See the top of this file."""
    if importlib.util.find_spec("triton") is None:
        print("triton must be installed to compile its kernels: pip install triton (Linux)", file=sys.stderr)
        return 2
    os.environ.pop("TRITON_INTERPRET", None)
    began = time.perf_counter()
    found = compile_all()
    table = draw_table(found)
    print(table)
    results = [result for by_chip in found.values() for result in by_chip.values()]
    refused = [result for result in results if result.problems]
    print(f"\n{len(results)} compiled in {time.perf_counter() - began:.0f} s, {len(refused)} refused", flush=True)
    if arguments != ["check"]:
        text = README.read_text()
        start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
        README.write_text(f"{text[:start]}\n{table}\n{text[stop:]}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

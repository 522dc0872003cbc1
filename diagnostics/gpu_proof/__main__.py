"""Do HYDRA's kernels compute the right thing on this GPU, how fast, and does a killed run go on? For any CUDA card.

    python -m diagnostics.gpu_proof [FILE]      writes the report, gpu-proof.md unless told

Every section is a process of its own with a time limit: what fails or takes too long is reported, and the rest goes on.
Needs torch and triton; what else is missing is named in the report. Exit status: 0 all is well, 1 something failed,
2 there is no GPU to prove anything on.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from diagnostics.gpu_proof.sections import SECTIONS

ROOT = Path(__file__).parents[2]


def write_section(title: str, path: Path) -> int:
    """Compute one section in this process and write it; its failure is its text."""
    try:
        text, status = SECTIONS[title][0](), 0
    except ModuleNotFoundError as error:
        text, status = f"Skipped: {error.name} is not installed.", 0
    except Exception:  # noqa: BLE001
        # Whatever happens on somebody's machine belongs into the report.
        text, status = f"**FAILED**\n\n```\n{traceback.format_exc()[-3000:]}\n```", 1
    path.write_text(text)
    return 1 if "**FAILED" in text else status


def run_section(title: str) -> tuple[str, bool]:
    """Markdown of a section, computed by a process of its own, and whether all is well in it."""
    limit_s = SECTIONS[title][1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "section.md"
        command = [sys.executable, "-m", "diagnostics.gpu_proof", "--section", title, str(path)]
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"**FAILED**: it took more than {limit_s} s.", False
        if not path.exists():
            return f"**FAILED**: the process died with status {status}.", False
        return path.read_text(), status == 0


def main(arguments: list[str]) -> int:
    """See the top of this file."""
    if arguments[:1] == ["--section"]:
        return write_section(arguments[1], Path(arguments[2]))
    import torch

    if not torch.cuda.is_available():
        print(
            f"a proof needs a CUDA GPU, but torch {torch.__version__} sees none here; nothing was run", file=sys.stderr
        )
        return 2
    report = Path(arguments[0] if arguments else "gpu-proof.md")
    began, parts, is_well = time.perf_counter(), [], True
    for title in SECTIONS:
        section_began = time.perf_counter()
        print(f"{title} ...", flush=True)
        text, section_is_well = run_section(title)
        is_well &= section_is_well
        seconds = time.perf_counter() - section_began
        print(f"{title}: {'done' if section_is_well else 'FAILED'}, {seconds:.0f} s", flush=True)
        parts.append(f"## {title}\n\n{text}\n\n{seconds:.0f} s\n")
        total = f"{time.perf_counter() - began:.0f} s"
        verdict = "all is well" if is_well else "something failed; see below"
        # After every section: whatever ends this program, what there is can be sent.
        report.write_text(f"# HYDRA on a GPU: {verdict} ({total})\n\n" + "\n".join(parts))
    print(f"written: {report.resolve()}", flush=True)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

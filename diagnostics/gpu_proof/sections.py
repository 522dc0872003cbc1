"""The sections of the report: functions without arguments that return Markdown, each run in a process of its own.

What a section needs is imported by it: a package that a machine lacks costs that section and no other.
"""

import importlib
import importlib.metadata
import platform
from collections.abc import Callable

from diagnostics.gpu_proof.text import as_table

PACKAGES = ("torch", "triton", "flash-attn", "liger-kernel", "transformers", "numpy", "pydantic", "safetensors")


def describe_machine() -> str:
    """The card and the software."""
    import torch

    card = torch.cuda.get_device_properties(0)
    rows = [
        ("GPU", card.name),
        ("compute capability", f"sm_{card.major}{card.minor}"),
        ("memory", f"{card.total_memory / 2**30:.1f} GiB"),
        ("multiprocessors", card.multi_processor_count),
        ("python", platform.python_version()),
    ]
    for package in PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return as_table(("what", "value"), rows)


def _in(module: str, name: str) -> Callable[[], str]:
    """A section by its name in a module of this package, imported when it is computed."""
    return lambda: getattr(importlib.import_module(f"diagnostics.gpu_proof.{module}"), name)()


SECTIONS: dict[str, tuple[Callable[[], str], float]] = {
    "Machine": (describe_machine, 30),
    "Numerics": (_in("numerics", "check_numerics"), 90),
    "Softmax attention": (_in("numerics", "check_attention_kernels"), 90),
    "Models": (_in("numerics", "check_models"), 90),
    "Offsets beyond 32 bits": (_in("numerics", "check_large_offsets"), 60),
    "Speed of operators": (_in("speed", "time_operators"), 150),
    "Speed of attention": (_in("speed", "time_attention"), 90),
    "Kill and resume": (_in("resume", "kill_and_resume"), 150),
    "Speed of training": (_in("speed", "time_training_step"), 180),
}
"""What computes each section, and the seconds it may take."""

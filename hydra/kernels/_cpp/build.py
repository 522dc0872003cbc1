"""Compile a C++ source of this folder once for each processor, compiler and torch, and load it."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

from hydra.errors import ConfigError

logger = logging.getLogger(__name__)

# No -ffast-math: linked into a library, it changes how the whole process treats denormal numbers.
FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-DTORCH_TARGET_VERSION=0x020d000000000000",
)


@cache
def load_library(name: str) -> None:
    """Load _cpp/<name>.cpp, which registers operators with torch; compiles it if this machine has not done so yet.

    Raises:
        ConfigError: there is no C++ compiler, or it does not take the source.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise ConfigError(
            f"{name} kernels need a C++ compiler, but {os.environ.get('CXX', 'g++')} is not on the path; install "
            "one (Debian: apt install g++), or ask for implementation='reference' of what needs them"
        )
    library = cache_folder() / f"{name}-{fingerprint(source, compiler)}.so"
    if not library.exists():
        compile_library(source, compiler, library)
    # With its symbols open to all: compiled graphs call its functions by name.
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def cache_folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/hydra, by default ~/.cache/hydra."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hydra"


def fingerprint(source: Path, compiler: str) -> str:
    """Of everything that decides what the compiled code is: source, headers, flags, compiler, torch, processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    cpuinfo = Path("/proc/cpuinfo")
    features = platform.machine()
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        features += "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    sources = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    parts = (*sources, " ".join(FLAGS), version, torch.__version__, features)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def compile_library(source: Path, compiler: str, library: Path) -> None:
    """Compile beside the library's place and rename, so that processes that do so at once do not meet."""
    started = time.monotonic()
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    link = [f"-L{root / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10", "-lpthread"]
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        output = Path(folder) / library.name
        done = subprocess.run(
            [compiler, *FLAGS, *include, str(source), "-o", str(output), *link], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise ConfigError(
                f"{compiler} must compile {source}, but it failed:\n{done.stderr[-2000:]}\n"
                "use another compiler (environment variable CXX), or implementation='reference' of what needs it"
            )
        output.replace(library)
    logger.info("compiled %s with %s in %.1f s; kept as %s", source.name, compiler, time.monotonic() - started, library)

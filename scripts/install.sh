#!/usr/bin/env bash
# Makes .venv: torch first and alone (CPU or CUDA build), then the hash-pinned lock, then HYDRA itself.
# Usage: bash scripts/install.sh [python3]; run by `make` when .venv is missing or out of date.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
say() { printf 'install: %s\n' "$*"; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    say "Python must be 3.11 or newer, but '$python' is $("$python" --version 2>&1); run: make PYTHON=python3.11" >&2
    exit 1
}
"$python" -c 'import ensurepip, venv' 2>/dev/null || {
    say "'$python' has no venv module; on Debian or Ubuntu: apt-get install python3-venv" >&2
    exit 1
}
torch=$(sed -n 's/^ *"torch==\([0-9.]*\)".*/\1/p' pyproject.toml)
pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }

say "making .venv with $("$python" --version)"
"$python" -m venv .venv

has_torch() { .venv/bin/python -c "
import importlib.metadata as m, sys
try: sys.exit(m.version('torch').split('+')[0] != '$torch')
except m.PackageNotFoundError: sys.exit(1)"; }
if has_torch; then
    say "torch $torch is there already"
elif nvidia-smi -L >/dev/null 2>&1; then
    say "torch $torch, CUDA build, because nvidia-smi lists a GPU here (several GB; this can take minutes)"
    pip install --quiet --no-deps "torch==$torch"
elif pip install --quiet --no-deps "torch==$torch+cpu" 2>/dev/null ||
    pip install --quiet --no-deps "torch==$torch+cpu" --index-url https://download.pytorch.org/whl/cpu 2>/dev/null; then
    say "torch $torch, CPU build, because nvidia-smi lists no GPU here"
else
    say "torch $torch as the package index gives it: no GPU here, but the CPU build cannot be had from it"
    pip install --quiet --no-deps "torch==$torch"
fi

say "the packages of requirements.lock, checked by hash"
pip install --quiet --require-hashes --requirement requirements.lock
if ! .venv/bin/python -c 'import importlib.metadata as m, sys; sys.exit(not m.version("torch").endswith("+cpu"))'; then
    say "the CUDA libraries that this torch build names"
    pip install --quiet "torch==$torch"
fi
pip install --quiet --no-deps --no-build-isolation --editable .
say "done: $(.venv/bin/python -c 'import torch; print("torch", torch.__version__)')"

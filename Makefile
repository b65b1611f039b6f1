# `make demo` and `make test` set up what they need themselves; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread a process: many small processes share the cores better than threads do.
export OMP_NUM_THREADS ?= 1

# What `make demo` runs on: DATA=synthetic (default), mimic3, mimic4 or tables.
DATA ?= synthetic
ROOT ?=
DRUGS ?=
SETTINGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint format lock bench-env clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## create .venv and install requirements.lock and the project into it

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.11 or newer is needed: make install PYTHON=python3.11"; exit 2; }
	@echo "installing into $(VENV) from requirements.lock (once; some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

demo: $(STAMP) ## the whole pipeline at small size, ending with one answered request
	@$(BIN)/python jobs/pipeline.py --config-name demo \
	  $(if $(filter synthetic,$(DATA)),,data=$(DATA)) \
	  $(if $(ROOT),"data.root=$(abspath $(ROOT))") $(if $(DRUGS),"data.drugs=$(abspath $(DRUGS))") $(SETTINGS)

test: $(STAMP) ## the default tests, under ten minutes
	@$(BIN)/python -m pytest -q -rs --durations=10 -n 2 --dist loadfile

test-slow: $(STAMP) ## tests that kill processes, submit jobs or open a browser, under forty minutes
	@$(BIN)/python -m pytest -q -rs --durations=10 -m slow -n 2 --dist loadfile

lint: $(STAMP) ## ruff, mypy and the layout tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_layout.py

format: $(STAMP) ## let ruff format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lock: ## write requirements.lock anew from pyproject.toml, in a fresh environment
	@platform/lock.sh

# The pins are complete, so pip looks for nothing else: xges would refuse newer numpy and numba.
BENCH := .bench
bench-env: $(patsubst platform/bench-env/%.txt,$(BENCH)/%/.installed,$(wildcard platform/bench-env/*.txt)) ## other packages that benchmarks and tests run beside ours, each in an environment of its own

$(BENCH)/%/.installed: platform/bench-env/%.txt | $(STAMP)
	@echo "installing $* into $(BENCH)/$*"
	@$(BIN)/python -m venv --clear $(BENCH)/$*
	@$(BENCH)/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

clean: ## remove caches (not .venv, not the data)
	@rm -rf build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -not -path './.bench/*' -prune -exec rm -rf {} +

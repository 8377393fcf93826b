# Needs make and Python >= 3.11 with venv; everything else comes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-lowest coverage test-gpu soak bench lint docs emoji

help:
	@echo 'make install   the package, editable, with its pinned dependencies, into $(VENV)'
	@echo 'make demo      install, then set a model free, measure it and show: out/demo/index.html'
	@echo 'make test      install, then the test suite'
	@echo 'make test-lowest  the test suite with the lowest versions that pyproject.toml allows, in $(LOWEST)'
	@echo 'make coverage  install, then the test suite, slower by a third or more, and the percentage of lines that it runs'
	@echo 'make test-gpu  install, then the tests for a card; PY=python3: with that Python as it is, nothing is installed'
	@echo 'make emoji     install, then the emoji family from nothing: about 6 hours on two cores, resumable; WORK=DIR'
	@echo 'make soak      install, then kill training 50 times, fill its disk, compare the bytes: some minutes'
	@echo 'make bench     install, what is compared with into $(BENCH_VENV), then how fast things are: at most 35 minutes on two cores; BENCH=quick: 7'
	@echo 'make lint      install, then ruff, mypy, and import-linter: which room may import which'
	@echo 'make docs      install, then the documentation: out/docs/index.html; a warning is an error'

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'Python >= 3.11 is needed: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --compile-bytecode -c constraints.txt -b constraints.txt -e '.[dev,docs,plots]'
	@touch $@

demo: install
	$(BIN)/libreflux demo

WORK ?= out/emoji

emoji: install
	$(BIN)/python -m libreflux.emoji.build all --work $(WORK)

# Three processes for two cores, each with the tests of whole files: some wait for processes that they stopped.
TOGETHER := -n 3 --dist loadfile --no-loadscope-reorder

test: install
	$(BIN)/python -m pytest $(TOGETHER)

# Of the tests' own processes; those that they start are not counted.
coverage: install
	$(BIN)/python -m pytest $(TOGETHER) --cov --cov-report=
	@echo "lines run: $$($(BIN)/coverage report --format=total) %"

LOWEST := .venv-lowest

# Direct dependencies at their lower bounds; what those need comes at its newest.
test-lowest: install
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	VIRTUAL_ENV=$(CURDIR)/$(LOWEST) $(BIN)/uv pip install --resolution lowest-direct -e '.[dev,plots]'
	$(LOWEST)/bin/python -m pytest $(TOGETHER)

# A machine with a card often has a Python whose torch was built for it: PY=python3 make test-gpu
test-gpu: $(if $(PY),,install)
	PYTHONPATH="$(CURDIR)/src$${PYTHONPATH:+:$$PYTHONPATH}" $(or $(PY),$(BIN)/python) -m pytest -m gpu tests/gpu

soak: install
	$(BIN)/python tests/soak.py

QUICK := $(if $(filter quick,$(BENCH)),-quick)
BENCH_VENV := .venv-bench

# A virtual environment of its own: the libraries that are compared with are large, and two of them slow every import.
bench: install
	test -x $(BENCH_VENV)/bin/python || $(PYTHON) -m venv $(BENCH_VENV)
	VIRTUAL_ENV=$(CURDIR)/$(BENCH_VENV) $(BIN)/uv pip install --compile-bytecode -c constraints.txt -b constraints.txt -e '.[bench]'
	$(BENCH_VENV)/bin/python -m benchmarks.speed --again --out out/bench$(QUICK) --json out/bench$(QUICK).json $(if $(QUICK),--quick)

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32 src
	$(BIN)/lint-imports --no-logo

docs: install
	$(BIN)/python -m sphinx -b html -E -n -W --keep-going -q docs out/docs

# esperd: `make demo` shows it, `make test` proves it. Both make .venv first; once installed, neither needs the network.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTED := $(VENV)/.installed-for-tests
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test coverage lint types bench bench-deps clean help

help:
	@echo "make demo        grow a network on scikit-learn's digits, live, and report (under a minute after the install)"
	@echo "make test        lint, types and the whole test-suite"
	@echo "make coverage    the test-suite with the lines counted that it runs; fails below 90 %"
	@echo "make bench       the quick form of the overhead bench; fails when a ratio leaves its recorded spread"
	@echo "make bench-deps  install what the benches compare with"

demo: $(INSTALLED)
	$(BIN)/esperd demo

test: $(TESTED)
	$(BIN)/ruff check esperd tests bench plugins
	$(BIN)/ruff format --check esperd tests bench plugins
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal -m "not slow"

# Apart from `test`: on Python 3.11 counting lines takes three quarters as long again as the tests themselves.
coverage: $(TESTED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal -m "not slow" --cov --cov-report=term --cov-fail-under=90

lint: $(TESTED)
	$(BIN)/ruff check esperd tests bench plugins
	$(BIN)/ruff format --check esperd tests bench plugins
	$(BIN)/lint-imports

types: $(TESTED)
	$(BIN)/mypy

bench: $(TESTED)
	$(BIN)/python bench/check.py

bench-deps: $(TESTED)
	@echo "bench/overhead.py compares with plain PyTorch, which is installed"
	$(PIP) install --quiet --constraint constraints.txt gromo==0.1.0
	$(PIP) install --quiet --constraint constraints.txt xoscar==0.12.2 pykka==4.5.0 thespian==4.0.1 ray==2.60.0

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "esperd needs Python 3.11 or newer; set PYTHON=" && false)
	$(PYTHON) -m venv $(VENV)

# torch first, by itself: pinned in constraints.txt, so that nothing else can pull in another build of it.
$(INSTALLED): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(TESTED): $(INSTALLED)
	$(PIP) install --quiet --constraint constraints.txt --upgrade 'pip>=25.1'
	$(PIP) install --quiet --constraint constraints.txt --group dev
	touch $@

clean:
	rm -rf $(VENV) demo-output build dist

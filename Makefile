# Two commands on a fresh machine: `make demo` and `make test`. Each sets everything up first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
# Tests side by side; each runs on one thread.
JOBS ?= auto

.PHONY: help setup demo test test-slow lint types docs check clean

help:            ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(BIN)/.installed  ## Make the virtual environment and install pinned dependencies.

# --use-pep517: seqeval comes as source, which pip before 23.1 would build without the build dependencies that it names.
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lossmith needs Python 3.11 or later, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --use-pep517 -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup      ## Run the main job: compare four arms on Python's own text, about three minutes.
	$(BIN)/lossmith compare --out $(OUT)

test: setup      ## Run the tests (under ten minutes).
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS)

test-slow: setup ## Run the tests that take longer.
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

lint: setup      ## Check style.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup     ## Check types.
	$(BIN)/mypy

docs: setup      ## Build the documentation, without network.
	$(BIN)/mkdocs build --strict

check: lint types docs test ## All of the above but the slow tests.

clean:           ## Remove what was built here.
	rm -rf $(VENV) site build dist .pytest_cache .mypy_cache .ruff_cache

# Every target makes the virtual environment first; a second run reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test soak lint types bench clean
.DEFAULT_GOAL := run

# torch goes in first and pinned, so that no other package's range can pull a different build.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Stillstream needs Python 3.11 or newer; this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: $(READY)
	$(BIN)/stillstream serve

test: $(READY)
	$(BIN)/python tests/e2e/chromium.py
	$(BIN)/pytest -m 'not soak'

soak: $(READY)
	$(BIN)/python tests/e2e/chromium.py
	$(BIN)/pytest -m soak

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/stillstream bench

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

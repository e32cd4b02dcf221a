# Every target makes the virtual environment first; a second run reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TOO_OLD := "Stillstream needs Python 3.11 or newer; this is " + sys.version.split()[0] + \
	". Name another one: make PYTHON=python3.12 run"

.PHONY: run test soak lint types bench clean
.DEFAULT_GOAL := run

# torch goes in first and pinned, so that no other package's range can pull a different build. setuptools is there
# for torch anyway; building with it keeps the build pinned as well.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and $(TOO_OLD))'
	@echo "Setting up $(VENV), once: PyTorch is a large download, so this can take some minutes."
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch setuptools
	$(INSTALL) --no-build-isolation --editable '.[dev]'
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
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Needs python3.11 (or PYTHON=...), pip and make. Everything is installed into .venv, from the package index alone.
# On Linux the index's torch brings CUDA along; for the smaller CPU build set PIP_EXTRA_INDEX_URL to PyTorch's own.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

# `pip --python` installs into an environment from outside, so Debian's separate python3.11-venv is not needed.
INSTALL = echo "installing into $(VENV), which takes a minute or two" && \
	$(PYTHON) -m venv --without-pip $(VENV) && \
	$(PYTHON) -m pip --python $(VENV) install -q -c constraints.txt pip

.PHONY: setup demo test check docs

setup: $(VENV)/.dev

demo: $(VENV)/.product build/tiny
	$(BIN)/lectern render examples/lessons.csv --out out/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py

$(VENV)/.product: pyproject.toml constraints.txt
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	@$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.product

build/tiny: | $(VENV)/.product
	$(BIN)/lectern weights tiny $@

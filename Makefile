# Two commands: `make demo` and `make test`. Each sets up .venv by itself.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: demo test lint check claims golden docs clean

demo: .venv/.base
	$(BIN)/penstock run gated_attention

test: .venv/.test
	$(BIN)/python -m pytest

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

# Every ready system at full budget over three seeds; the verdicts as they come are stored and the docs rebuilt.
claims: .venv/.test
	$(BIN)/python -m tools.claims

# How near the authors' own numbers each system comes, with the cases at hand.
golden: .venv/.test
	$(BIN)/python -m tools.golden

docs: .venv/.test
	$(BIN)/python -m tools.docs

.venv/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt -e .
	@touch $@

.venv/.test: .venv/.base
	$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Two commands for a new user: `make demo` and `make test`. Both build the environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A demo on another size: make demo DEMO_ARGS="--size 96"
DEMO_ARGS ?=
PYTEST_ARGS ?=

.PHONY: env demo test lint types clean

env: $(VENV)/.ready

# Rebuilt when what is installed changes; the marker is written last, so an interrupted install is redone.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: env
	$(BIN)/voxclf demo $(DEMO_ARGS)

test: env
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: env
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo

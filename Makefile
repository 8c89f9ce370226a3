# Two commands do everything: `make demo` and `make test`. Each makes the environment first.

PYTHON ?= python3
# What pip installs for PyTorch. On Linux without a graphics card, a CPU build is far smaller.
TORCH ?= torch
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.ready
	$(BIN)/llada2-mlx demo demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest

lint: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet ruff
	$(BIN)/ruff check .

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build demo *.egg-info

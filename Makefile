# Two commands do everything: `make demo` and `make test`. Each makes the environment first.

PYTHON ?= python3
# What pip installs for PyTorch. On Linux without a graphics card, a CPU build is far smaller.
TORCH ?= torch
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test shapes evaluate benchmarks lint clean

demo: $(VENV)/.ready
	$(BIN)/llada2-mlx demo demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest

# Trains the built-in model from scratch; stopped anywhere, the next call goes on.
shapes: $(VENV)/.ready
	$(BIN)/python -m llada2_mlx.shapes.training

# The table of what the built-in model can do.
evaluate: $(VENV)/.ready
	$(BIN)/python -m llada2_mlx.shapes.measures

# How fast generation is on a random model; more with ARGS, such as ARGS="--only 512 --json figures.json".
benchmarks: $(VENV)/.ready
	cd tests && ../$(BIN)/python -m benchmarks $(ARGS)

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

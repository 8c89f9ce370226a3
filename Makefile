# Two commands do everything: `make demo` and `make test`. Each makes the environment first.

PYTHON ?= python3
# What pip installs for PyTorch. On Linux without a graphics card, a CPU build is far smaller.
TORCH ?= torch
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
REGISTRY := .venv-registry
# The ComfyUI that `make comfyui` gets, for those who have none.
COMFYUI := build/comfyui
COMFYUI_SOURCE ?= https://github.com/comfyanonymous/ComfyUI
COMFYUI_VERSION ?= v0.33.0
# Test files that run at the same time. Each of the processes may start a ComfyUI and read models: 4 GB of memory each.
JOBS ?= 2

.PHONY: demo test test-lowest browser comfyui shapes evaluate benchmarks fuzz kills soak lint validate check-tag clean

demo: $(VENV)/.ready
	$(BIN)/llada2-mlx demo demo

# Threads that wait for one another cost more than they bring where several processes share the cores.
test test-lowest browser: export OMP_NUM_THREADS ?= 1

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --max-worker-restart 2 --durations 20

# All that is tested in a browser, with two front ends; pictures of it in build/browser. Some of it with ARGS="-k story".
browser: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable ".[test,browser]"
	$(BIN)/python -m pytest tests/browser -m "" --durations 20 $(ARGS)

# The tests with the lowest versions that pyproject.toml allows; some of them with ARGS="tests/test_tokens.py".
test-lowest: $(LOWEST)/.ready
	$(LOWEST)/bin/python -m pytest $(ARGS)

# Trains the built-in model from scratch; stopped anywhere, the next call goes on.
shapes: $(VENV)/.ready
	$(BIN)/python -m llada2_mlx.shapes.training

# The tables of what the built-in model can do.
evaluate: $(VENV)/.ready
	$(BIN)/python -m llada2_mlx.shapes.measures
	$(BIN)/python -m llada2_mlx.shapes.measures --further

# How fast generation is on a random model; more with ARGS, such as ARGS="--only 512 --json figures.json".
benchmarks: $(VENV)/.ready
	cd tests && ../$(BIN)/python -m benchmarks $(ARGS)

# Inputs that nobody would think of, from a seed: make fuzz COUNT=100000 ARGS="--seed 7 --only configs" runs for hours.
COUNT ?= 1000
fuzz: $(VENV)/.ready
	cd tests && ../$(BIN)/python -m fuzz --count $(COUNT) $(ARGS)

# Programs that are killed at random points, and whether the next run is right.
kills: $(VENV)/.ready
	cd tests && ../$(BIN)/python -m reliability $(ARGS)

# Hundreds of prompts on a real ComfyUI, with cancels, freed memory and replaced files in between.
soak: $(VENV)/.ready
	PYTHONPATH=tests $(BIN)/python tests/comfyui/soak.py $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# What ComfyUI's registry checks before it takes a version.
validate: $(REGISTRY)/.ready
	PATH="$(CURDIR)/$(REGISTRY)/bin:$$PATH" comfy --skip-prompt node validate

# Whether TAG, such as v0.1.0, is the version of pyproject.toml.
check-tag:
	$(PYTHON) -c 'import sys, tomllib; v = tomllib.load(open("pyproject.toml", "rb"))["project"]["version"]; \
	    sys.exit(None if sys.argv[1] == "v" + v else f"The tag {sys.argv[1]} is not v{v}, the version of pyproject.toml.")' "$(TAG)"

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

# Every bound of pyproject.toml, as the version to install; PyTorch is what TORCH says.
$(LOWEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet "$(TORCH)"
	$(LOWEST)/bin/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	    print(*(d.replace(">=", "==") for d in p["dependencies"] + p["optional-dependencies"]["test"] \
	    if not d.startswith("torch>")), sep="\n")' > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --requirement $(LOWEST)/lowest.txt
	touch $@

comfyui: $(COMFYUI)/.ready

$(COMFYUI)/.ready: requirements.txt
	test -e $(COMFYUI) || git clone --quiet --depth 1 --branch $(COMFYUI_VERSION) $(COMFYUI_SOURCE) $(COMFYUI)
	$(PYTHON) -m venv $(COMFYUI)/venv
	$(COMFYUI)/venv/bin/python -m pip install --quiet "$(TORCH)" -r $(COMFYUI)/requirements.txt -r requirements.txt
	touch $@

$(REGISTRY)/.ready:
	$(PYTHON) -m venv $(REGISTRY)
	$(REGISTRY)/bin/python -m pip install --quiet comfy-cli
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(REGISTRY) build demo *.egg-info

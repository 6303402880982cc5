# `make quickstart` and `make test` do all set-up themselves, from a machine with Python, make and git.
PYTHON ?= python3
VENV = .venv
FLOOR = .venv-floor
BIN = $(VENV)/bin

NANO_SMOKE = runs/nano-smoke

.PHONY: quickstart setup train-nano-smoke test test-floor test-all lint clean

quickstart: setup
	$(BIN)/python scripts/chat.py assets/example.png "Read the text."
	$(BIN)/python scripts/chat.py assets/receipt.png "What is the total?" --subfolder nano-documents --preset default

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet ".[dev]"
	touch $@

# The whole training pipeline on a CPU: rendered documents, a fresh Nano, a few steps, evaluation. It learns next to nothing.
train-nano-smoke: setup
	rm -rf $(NANO_SMOKE)
	$(BIN)/python scripts/finetune.py scripts/training/recipes/nano-smoke.yaml --set output=$(NANO_SMOKE)
	$(BIN)/python scripts/evaluate.py --model $(NANO_SMOKE)/model --items 4

test: setup
	$(BIN)/python -m pytest -q

# The same tests on the oldest supported transformers.
$(FLOOR)/.ready: pyproject.toml
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/pip install --quiet --upgrade pip
	$(FLOOR)/bin/pip install --quiet ".[dev]" "transformers==5.16.0"
	touch $@

test-floor: $(FLOOR)/.ready
	$(FLOOR)/bin/python -m pytest -q

test-all: setup
	$(BIN)/python -m pytest -q -m "not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(FLOOR) build *.egg-info

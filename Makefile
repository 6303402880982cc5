# `make quickstart` and `make test` do all set-up themselves, from a machine with Python, make and git. They install the versions
# of requirements/lock.txt; `make test-newest` and `make test-floor` take the newest of everything, and the oldest that we support.
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
NEWEST = .venv-newest
FLOOR = .venv-floor
DEMO = .venv-demo
RAY = .venv-ray
LOCK = requirements/lock.txt
LOWEST = requirements/floor.txt

OVERLAYS = .overlays
FLOOR_TRANSFORMERS = $(shell grep '^transformers==' $(LOWEST))
CORE = -m pytest -q -m core
VERSION = import importlib.metadata; print(importlib.metadata.version('transformers'))

TYPECHECK = build/typecheck
NANO_SMOKE = runs/nano-smoke

.PHONY: quickstart setup train-nano-smoke test test-newest test-floor test-core-newest test-core-floor test-demo test-ray test-all lint lock clean

quickstart: setup
	$(BIN)/python scripts/chat.py assets/example.png "Read the text."
	$(BIN)/python scripts/chat.py assets/receipt.png "What is the total?" --subfolder nano-documents --preset default

setup: $(VENV)/.ready

$(VENV)/.ready: $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r $(LOCK)
	touch $@

# The whole training pipeline on a CPU: rendered documents, a fresh Nano, a few steps, evaluation. It learns next to nothing.
train-nano-smoke: setup
	rm -rf $(NANO_SMOKE)
	$(BIN)/python scripts/finetune.py scripts/training/recipes/nano-smoke.yaml --set output_dir=$(NANO_SMOKE)
	$(BIN)/python scripts/evaluate.py --model $(NANO_SMOKE)/model --items 4

test: setup
	$(BIN)/python -m pytest -q

$(NEWEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --upgrade pip
	$(NEWEST)/bin/pip install --quiet --upgrade ".[dev]"
	touch $@

test-newest: $(NEWEST)/.ready
	$(NEWEST)/bin/python -m pytest -q

$(FLOOR)/.ready: pyproject.toml $(LOWEST)
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/pip install --quiet --upgrade pip
	$(FLOOR)/bin/pip install --quiet ".[dev]" -c $(LOWEST)
	touch $@

test-floor: $(FLOOR)/.ready
	$(FLOOR)/bin/python -m pytest -q

# The core tests beside another transformers than the locked one: laid, with what it needs, over the locked
# set, so that torch need not come again.
test-core-floor: setup
	rm -rf $(OVERLAYS)/floor
	$(BIN)/pip install --quiet --target $(OVERLAYS)/floor "$(FLOOR_TRANSFORMERS)"
	PYTHONPATH=$(OVERLAYS)/floor $(BIN)/python $(CORE)

test-core-newest: setup
	rm -rf $(OVERLAYS)/newest
	$(BIN)/pip install --quiet --target $(OVERLAYS)/newest "transformers<6"
	newest=$$(PYTHONPATH=$(OVERLAYS)/newest $(BIN)/python -c "$(VERSION)"); \
	if [ $$newest = $$($(BIN)/python -c "$(VERSION)") ]; then echo "transformers $$newest is the newest, and the locked one."; \
	else echo "transformers $$newest:" && PYTHONPATH=$(OVERLAYS)/newest $(BIN)/python $(CORE); fi

<<<<<<< HEAD
# Documents read by Ray's workers, one of which is killed. What Ray needs is laid
# over the locked set.
$(RAY)/.ready: $(VENV)/.ready pyproject.toml
	$(PYTHON) -m venv $(RAY)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$($(RAY)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/locked.pth
	$(RAY)/bin/pip install --quiet "ray[data]"
=======
# What is at odds with the locked versions, or large, has an environment of its own, laid over the locked one.
PACKAGES = import sysconfig; print(sysconfig.get_path('purelib'))
$(DEMO)/.ready: EXTRA = browser
$(RAY)/.ready: EXTRA = ray
$(DEMO)/.ready $(RAY)/.ready: %/.ready: $(VENV)/.ready pyproject.toml
	$(PYTHON) -m venv $*
	$(BIN)/python -c "$(PACKAGES)" > $$($*/bin/python -c "$(PACKAGES)")/locked.pth
	$*/bin/pip install --quiet ".[$(EXTRA)]"
>>>>>>> main
	touch $@

# The demo page in Chromium (Debian: apt-get install chromium). gradio wants an older Pillow than the locked one.
test-demo: $(DEMO)/.ready
	$(DEMO)/bin/python -m pytest -q -m browser

# Documents read by Ray's workers, one of which is killed.
test-ray: $(RAY)/.ready
	$(RAY)/bin/python -m pytest -q -m ray tests/test_reading_engines.py

<<<<<<< HEAD
# The demo page in Chromium (Debian: apt-get install chromium). gradio wants an older Pillow than the locked one, so that the page
# has an environment of its own, laid over the locked one.
$(DEMO)/.ready: $(VENV)/.ready pyproject.toml
	$(PYTHON) -m venv $(DEMO)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$($(DEMO)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/locked.pth
	$(DEMO)/bin/pip install --quiet ".[browser]"
	touch $@

test-demo: $(DEMO)/.ready
	$(DEMO)/bin/python -m pytest -q -m browser

=======
>>>>>>> main
test-all: setup
	$(BIN)/python -m pytest -q -m "not gpu and not browser and not ray and not vllm"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPECHECK) && mkdir -p $(TYPECHECK)/minimonkey && cp -r *.py scripts $(TYPECHECK)/minimonkey
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

# The versions for every Python and system that we support, from pyproject.toml. What is locked stays as far as it still fits;
# `make lock UPGRADE=--upgrade` moves all of it to the newest, `UPGRADE="--upgrade-package transformers"` one package.
UPGRADE =
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --extra dev --no-annotate --custom-compile-command "make lock" pyproject.toml
lock: setup
	$(BIN)/pip install --quiet uv
	$(COMPILE) --output-file $(LOCK) $(UPGRADE)
	$(COMPILE) --output-file $(LOWEST) --resolution lowest-direct --no-deps --upgrade

clean:
	rm -rf $(VENV) $(NEWEST) $(FLOOR) $(DEMO) $(RAY) $(OVERLAYS) build *.egg-info

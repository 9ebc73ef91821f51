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
RELEASES ?= 0.33.0 0.32.0 0.31.0 0.30.0
MINUTES ?= 20
SECONDS ?= 300
# Not `python -m pytest`: that would put the checkout, and so a top-level `kernels`, on the path.
PYTEST  := $(BIN)/pytest
# A test's tensors are small: a core for each worker is worth more than threads.
UNIT    := OMP_NUM_THREADS=1 $(PYTEST) tests --numprocesses auto --maxprocesses 4 --dist loadfile
# Engines start mostly on one core; two at a time fit into 16 GB.
ENGINE  := $(PYTEST) integration_tests --numprocesses auto --maxprocesses 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast test-engines test-upstream nightly matrix lint types format docs site surface check-vllm support release-check bench bench-base bench-kernels bench-merging gain-ratio gpu gpu-report gpu-bundle kernels-table dist clean soak fuzz rl rl-frameworks fleet fleet-sim

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) ## create .venv with every pinned requirement

$(READY): $(PINS) setup.py scripts/make_venv.sh
	@VENV=$(VENV) PYTHON=$(PYTHON) scripts/make_venv.sh

demo: $(READY) ## serve the trained example adapters, ask them, draw the table
	$(BIN)/python examples/demo.py

test: lint types test-fast test-engines ## everything CI runs: lint, types, unit and engine tests

test-fast: $(READY) ## unit tests only, no engine
	$(UNIT)

test-engines: $(READY) ## engine tests only
	$(ENGINE)

test-upstream: $(READY) ## vLLM's own LoRA tests with the plugin's classes in place of stock's
	$(BIN)/python scripts/test_upstream.py

nightly: test-upstream matrix ## what is right but too long for CI

matrix: $(READY) ## kinds of adapters × features of the engine: ask all, write docs/matrix.md
	VLLM_LORA_EXT_MATRIX=$(CURDIR)/docs/matrix.json $(PYTEST) integration_tests/test_matrix.py \
		integration_tests/test_matrix_bases.py integration_tests/test_matrix_lora_flags.py \
		integration_tests/test_matrix_http.py integration_tests/test_matrix_pooling.py \
		integration_tests/test_says_server.py \
		integration_tests/test_smollm2.py \
		integration_tests/test_templates.py::test_a_rotation_of_users_over_few_slots
	$(BIN)/python scripts/matrix_page.py

soak: $(READY) ## a day of traffic in MINUTES=20, then servers that are killed; 1 if anything was wrong or leaked
	$(BIN)/python -m integration_tests.soak --minutes $(MINUTES)

fuzz: $(READY) ## adapter folders, recipes and mix names, other files, HTTP fields, SECONDS=300 each; findings in build/fuzz/found
	$(BIN)/python scripts/fuzz/run.py --seconds $(SECONDS)

rl: $(READY) ## reinforcement learning on the demo's model: plain, then routed, minutes each
	$(BIN)/python examples/rl_loop.py

rl-frameworks: $(READY) ## what TRL, verl, ms-swift and SkyRL do to vLLM, by their own code from PyPI
	$(BIN)/python scripts/rl_frameworks.py

fleet: $(READY) ## two replicas under Ray Serve, one of them killed under load
	$(BIN)/pip install -q "ray[serve]==2.60.0"
	VLLM_LORA_EXT_FLEET=1 $(PYTEST) integration_tests/test_fleet.py

fleet-sim: $(READY) ## 100 000 adapters on N servers: placement policies, from measured numbers
	$(BIN)/python benchmarks/fleet_sim.py

lint: $(READY) ## ruff: rules and format; nothing that only tests call
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/lint_callers.py

types: $(READY) ## mypy over the package
	$(BIN)/python scripts/typecheck.py

format: $(READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## write the pages of systems and formats; build the site, links checked, in build/site
	$(BIN)/python scripts/system_pages.py
	@$(MAKE) --no-print-directory site

site: $(READY) requirements/docs.txt
	@test -x build/docs-venv/bin/python || $(PYTHON) -m venv build/docs-venv
	@build/docs-venv/bin/python -m pip install -qq --no-deps -r requirements/docs.txt
	$(BIN)/python scripts/site.py
	build/docs-venv/bin/python -m mkdocs build --strict --quiet

surface: $(READY) ## write down what users may rely on (docs/surface.json)
	$(BIN)/python scripts/surface.py

check-vllm: $(READY) ## do the patches fit a vLLM? VERSION=0.33.0, newest, or empty: the installed; RECORD=1: write it down
	$(BIN)/vllm-lora-ext check-vllm $(VERSION) $(if $(RECORD),--record)

support: $(READY) ## hold the patches against RELEASES="0.33.0 0.32.0", write docs/support.md
	$(BIN)/python scripts/support_page.py --look $(RELEASES)

release-check: $(READY) ## is TAG=v1.2.3 the version that the package and the changelog say?
	$(BIN)/python scripts/release_check.py $(TAG)

bench-kernels: $(READY) ## GPU kernels: ratios to stock and to the floors
	$(BIN)/python benchmarks/kernels/bench_gated_lora.py

bench: $(READY) ## serving overhead against stock vLLM, as ratios
	$(BIN)/python benchmarks/serving_overhead.py

bench-base: $(READY) ## what the plugin costs requests without an adapter
	$(BIN)/python benchmarks/base_requests.py

bench-merging: $(READY) ## what is left of three skills after every merge
	$(BIN)/python benchmarks/merging_quality.py

gain-ratio: $(READY) ## train every system, ask it in transformers and in vLLM: what is left of the gain
	$(BIN)/python benchmarks/gain_ratio.py

gpu: ## check and measure this machine's GPU (docs/gpu.md): STAGES="probe bench=300", GPU_PYTHON=
	$(GPU_PYTHON) -P scripts/gpu/run.py $(STAGES) $(GPU_ARGS)

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

# Two commands matter: `make serve` and `make test`. Everything lives in .venv; nothing is installed elsewhere.
#   EXTRA=cpu|gpu   overrides what is detected        PYTHON=python3.12   the interpreter to build .venv with
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
EXTRA ?= $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo gpu || echo cpu)
BIN := .venv/bin
DEMO := models/demo/config.json
PINS := constraints.txt constraints-$(EXTRA).txt
TORCH := $(shell grep '^torch==' constraints-$(EXTRA).txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu
# The stamp's name holds a digest of everything that decides the environment, so a .venv made from other
# pins, another extra or a half-finished install is never taken for this one.
STAMP := .venv/made-for-$(EXTRA)-$(shell cat pyproject.toml $(PINS) | sha256sum | cut -c1-16)

export RAY_USAGE_STATS_ENABLED := 0
export VLLM_NO_USAGE_STATS := 1
export VLLM_DO_NOT_TRACK := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install serve test check load load-ui bench-gateway clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

serve: install $(DEMO) ## Serve the demo model on http://127.0.0.1:8000 (deploy.yaml)
	$(BIN)/local-attention serve deploy.yaml

test: install $(DEMO) ## Run every test, real engines included
	$(BIN)/python -m pytest

check: install ## Lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

load: install ## Load a running server for a minute and print a table for each length class
	$(BIN)/local-attention client --test-mode benchmark --run-time 60s --rate 2

load-ui: install ## Open Locust's page on http://127.0.0.1:8089 for a running server
	$(BIN)/locust -f load_tests/benchmark.py --web-host 127.0.0.1 --host http://127.0.0.1:8000

bench-gateway: install $(DEMO) ## Measure the time that the gateway adds to an engine's own port
	$(BIN)/python -m benchmarks.gateway_serve

clean: ## Remove .venv and the demo model
	rm -rf .venv models/demo

install: $(STAMP) ## Create .venv with everything pinned

$(DEMO): serve_app/demo/model.py serve_app/demo/weights/full.safetensors | $(STAMP)
	$(BIN)/local-attention demo-model models/demo

# --no-deps: the constraints files are the whole tree, so nothing is resolved and nothing else can arrive.
# Where the default index has no CPU build of PyTorch, PyTorch's own index has it.
$(STAMP):
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer with venv is needed; name one with PYTHON=..." >&2; exit 1; }
	@echo "Installing into .venv ($(EXTRA)); a few minutes."
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-deps '$(TORCH)' $(if $(filter cpu,$(EXTRA)),|| \
	  { echo "Not on the default index; taking $(TORCH) from $(CPU_INDEX)."; \
	    $(BIN)/pip install -q --no-deps --index-url $(CPU_INDEX) '$(TORCH)'; })
	$(BIN)/pip install -q --no-deps $(addprefix -r ,$(PINS))
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@touch $@

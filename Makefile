# Every target does its own set-up. Variables: PYTHON, the interpreter that makes the
# environment, and VENV, where it is made: `make test PYTHON=python3.13 VENV=.venv-3.13`.

VENV ?= .venv
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' \
		2>/dev/null && echo $$python && break; done)
STAMP := $(VENV)/.installed
PYTEST := $(VENV)/bin/python -m pytest
# Planning compiles with libtpu, and the newest Python gets the newest one.
PLAN_VENV ?= .venv-plan
PLAN_PYTHON ?= $(shell for minor in 13 12 11; do for python in python3.$$minor \
	"$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.$$minor.*/bin/python3; do \
	"$$python" -c 'import ensurepip' 2>/dev/null && echo "$$python" && exit; done; done)
PLAN_STAMP := $(PLAN_VENV)/.installed
# Nothing else needs PyTorch, so it stays out of the other environments.
TORCH_VENV ?= .venv-torch
TORCH_STAMP := $(TORCH_VENV)/.installed
comma := ,

# Answers computed by Meta's code; the cases that need them are left out without them.
LLAMA_REFERENCE ?= ../shared/reference
ifneq ($(wildcard $(LLAMA_REFERENCE)/.),)
export LLAMA_REFERENCE := $(abspath $(LLAMA_REFERENCE))
endif

.PHONY: help setup demo test check slow plan torch docs page
.DEFAULT_GOAL := help

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## Make the environment: .venv, with everything installed.

# Make an environment: its directory, the Python, the extras.
define install
	@test -n '$(2)' || { echo 'No Python 3.11 or newer with venv was found:' \
		'install one, or name it: make PYTHON=/path/to/python3' >&2; exit 1; }
	@echo 'Installing into $(1) with $(2); the first time takes some minutes.'
	@$(2) -m venv $(1)
	@$(1)/bin/pip install -qq --disable-pip-version-check -e '.[$(3)]'
	@touch $@
endef

$(STAMP): pyproject.toml
	$(call install,$(VENV),$(PYTHON),dev$(comma)demo)

$(PLAN_STAMP): pyproject.toml
	$(call install,$(PLAN_VENV),$(PLAN_PYTHON),dev$(comma)demo$(comma)tpu)

$(TORCH_STAMP): pyproject.toml
	$(call install,$(TORCH_VENV),$(PYTHON),dev$(comma)torch)

demo: $(STAMP)  ## Train a small Llama 2 on English text, then let it write.
	@$(VENV)/bin/python -m scripts.demo

test: $(STAMP)  ## Run all tests but the slow ones, in under ten minutes.
	@$(PYTEST) -n 2

check: $(STAMP)  ## Check format, lint, types and the direction of imports.
	@$(VENV)/bin/ruff format --check --quiet . || { \
		echo 'Not formatted: run $(VENV)/bin/ruff format .' >&2; exit 1; }
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/pyrefly check --python-interpreter-path $(VENV)/bin/python
	@$(VENV)/bin/lint-imports

docs: $(STAMP)  ## Check that links lead somewhere and that the paper map is true.
	@$(VENV)/bin/python docs/check.py

page: $(STAMP)  ## Run generate.ipynb with the demo's model and write docs/pages/generate.md.
	@$(VENV)/bin/pip install -qq --disable-pip-version-check -e '.[notebook]'
	@LLAMA_CHECKPOINT=$(CURDIR)/runs/demo $(VENV)/bin/python -m scripts.notebook_page

# Run the tests that have a marker; pytest says 5 if there are none.
define run_marked
	@$(PYTEST) -m '$(1)' || { code=$$?; test $$code -eq 5 \
		&& echo 'No test with the marker $(firstword $(1)) is here to run.' || exit $$code; }
endef

slow: $(STAMP)  ## Run the tests that take longer than 5 seconds each.
	$(call run_marked,slow and not (torch or plan or network))

plan: $(PLAN_STAMP)  ## Compile every recipe for its pod; write docs/performance.md's table.
	@$(PLAN_VENV)/bin/python -m pytest -n 2 -m plan
	@$(PLAN_VENV)/bin/python -m scripts.plan_table

torch: $(TORCH_STAMP)  ## Compare checkpoints with PyTorch's and transformers' own code.
	@$(TORCH_VENV)/bin/python -m pytest -n 2 -m torch

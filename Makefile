# Everything that a person does with this repository. The first run of a target sets up what it needs and says so; later ones need
# no network. `make` alone lists the targets.

VENV ?= .venv
# Workers of the test run; 0 runs everything in one process.
JOBS ?= auto
# More arguments for pytest, e.g. make test ARGS='-k handshake -x'
ARGS ?=

PYTHONS := $(wildcard pools ustack tests tools)
export PATH := $(PATH):/usr/sbin:/sbin

.PHONY: help setup run test lint format bench soak docs clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'

setup: ## virtual environment in .venv with ustack and the tools for tests and lint
	@tools/make-venv $(VENV) test,lint

run: setup ## the demo: our stack on a TAP copies a disk over NBD, under memory pressure too
	@$(VENV)/bin/ustack demo

test: setup ## every test; installs the programs they talk to when run as root
	@tools/install-system-packages || [ "$(CI)" != true ]
	@$(VENV)/bin/python -m pytest -n $(JOBS) -m 'not benchmark_only' --benchmark-disable $(ARGS)

lint: setup ## style, types, arrows between layers
	@$(VENV)/bin/ruff check $(PYTHONS)
	@$(VENV)/bin/ruff format --check --quiet $(PYTHONS) || { echo "lint: not formatted; 'make format' does it" >&2; exit 1; }
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

format: setup ## put the code into the form that lint asks for
	@$(VENV)/bin/ruff check --quiet --fix-only $(PYTHONS)
	@$(VENV)/bin/ruff format $(PYTHONS)

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

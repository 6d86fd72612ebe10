# Everything that a person does with this repository. The first run of a target sets up what it needs and says so; later ones need
# no network. `make` alone lists the targets.

VENV ?= .venv
# Workers of the test run; 0 runs everything in one process.
JOBS ?= auto
# Seeds for each test of the simulator in `make soak`.
SEEDS ?= 10000
# Frames in `make fuzz`.
FRAMES ?= 10000000
# More arguments for pytest, e.g. make test ARGS='-k handshake -x'
ARGS ?=

PYTHONS := $(wildcard pools ustack tests tools)
export PATH := $(PATH):/usr/sbin:/sbin

.PHONY: help setup compile run test lint format bench soak pressure swap fuzz golden docs clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s%s\n", $$1, $$2 }' Makefile

setup: ## virtual environment in .venv with ustack and the tools for tests and lint; compiles the hot path where it can
	@tools/make-venv $(VENV) test,lint,compile
	@$(VENV)/bin/python tools/compile_hot_path.py

compile: ## compile the hot path again, after a change of the sources
	@tools/make-venv $(VENV) test,lint,compile
	@$(VENV)/bin/python tools/compile_hot_path.py --force

run: setup ## the demo: our stack on a TAP copies a disk over NBD, under memory pressure too
	@$(VENV)/bin/ustack demo

test: setup ## every test; installs the programs they talk to when run as root
	@tools/install-system-packages || [ "$(CI)" != true ]
	@$(VENV)/bin/python -m pytest -n $(JOBS) -m 'not benchmark_only' --benchmark-disable $(ARGS)
	@[ -n "$(ARGS)" ] || tools/test-compiled $(VENV) -n $(JOBS) --benchmark-disable

lint: setup ## style, types, arrows between layers
	@$(VENV)/bin/ruff check $(PYTHONS)
	@$(VENV)/bin/ruff format --check --quiet $(PYTHONS) || { echo "lint: not formatted; 'make format' does it" >&2; exit 1; }
	@$(VENV)/bin/mypy $(wildcard pools ustack tests tools/*.py tools/sockdriver tools/swaplab)
	@$(VENV)/bin/lint-imports

format: setup ## put the code into the form that lint asks for
	@$(VENV)/bin/ruff check --quiet --fix-only $(PYTHONS)
	@$(VENV)/bin/ruff format $(PYTHONS)

bench: setup ## benchmarks, one at a time; figures of a machine with neighbours move: quote ratios and medians
	@$(VENV)/bin/python -m pytest -n 0 --benchmark-only --benchmark-group-by=group --benchmark-columns=median,iqr,min,rounds $(ARGS)

soak: setup ## the simulator with SEEDS seeds for each of its tests (10,000 unless told otherwise)
	@$(VENV)/bin/python -m pytest -n $(JOBS) -m sim --seeds $(SEEDS) $(ARGS)

pressure: setup ## every scenario of the pressure lab with a thousand seeds, in virtual time
	@$(VENV)/bin/ustack pressure run --seeds 1000 $$($(VENV)/bin/ustack pressure list --names)

swap: setup ## real swap on this machine over each pool, ten times, broken on purpose and verified; needs root
	@tools/install-system-packages
	@$(VENV)/bin/python -m tools.swaplab host --runs 10

fuzz: setup ## FRAMES frames that no good host sends, to stacks with connections (ten million unless told otherwise)
	@$(VENV)/bin/python -m tests.fuzz --frames $(FRAMES)

golden: setup ## docs/reference/throughput.md: throughput over a simulated wire by loss, delay and buffer
	@$(VENV)/bin/python tools/golden_table.py

docs: setup ## the documentation as HTML in build/docs
	@tools/make-venv $(VENV) docs
	@$(VENV)/bin/python tools/reference.py
	@$(VENV)/bin/python tools/reference_pages.py
	@$(VENV)/bin/python tools/rfc_page.py
	@$(VENV)/bin/sphinx-build -q -W -b html docs build/docs
	@echo "docs: build/docs/index.html"

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

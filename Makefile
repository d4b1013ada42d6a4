# Every target runs from nothing: the virtual environment is made when it is missing.
PYTHON ?= python3
FAMILY ?= mistral
METHODS ?= weight_average task_arithmetic expert_merging
SEED ?= 0
WORKERS ?= 2
CASES ?= 50000
SECONDS ?= 1200
FAULTS ?= 200
BIN := .venv/bin

.PHONY: help setup demo test test-fast faults lint docs fuzz bench bench-quality clean
.DEFAULT_GOAL := help

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

.venv/.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	@# A torchvision built for another torch cannot be loaded, and neither timm nor `accelerate launch` survives finding it.
	@$(BIN)/python -c "import torchvision" 2>/dev/null || { \
		echo "torchvision does not fit this torch: removing it and timm, which only checkpoints with code of their own need"; \
		$(BIN)/pip uninstall --quiet --yes torchvision timm; }
	touch $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

.venv/.installed-docs: requirements-docs.txt .venv/.installed
	$(BIN)/pip install --quiet -r requirements-docs.txt
	touch $@

setup: .venv/.installed  ## install what merging needs into .venv

demo: setup  ## train a small base and its experts, merge them, print accuracies (FAMILY=, METHODS=, SEED=)
	$(BIN)/python -m zoo demo $(FAMILY) --methods $(METHODS) --seed $(SEED)

test: .venv/.installed-dev  ## run all tests (WORKERS= processes)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-fast: .venv/.installed-dev  ## run the tests that take less than half a second each, with fewer examples
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" --hypothesis-profile fast

faults: .venv/.installed-dev  ## kill runs and break what they need at random moments (FAULTS= kills of each kind)
	FAULTS=$(FAULTS) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/faults

lint: .venv/.installed-dev docs  ## check format, style, types and the documentation's links
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/.installed-docs  ## build the documentation into site/; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

fuzz: .venv/.installed-dev  ## read 50,000 damaged files of every kind (CASES=, SECONDS=)
	FUZZ=all $(BIN)/python -m pytest -n $(WORKERS) tests/fuzz -k every_setting
	$(BIN)/python -m tests.fuzz --cases $(CASES) --seconds $(SECONDS)

bench: setup  ## measure speed and memory against the limits of the machine
	$(BIN)/python -m benchmarks.speed

bench-quality: setup  ## measure accuracy of all methods and ablations on small real experts, with five seeds
	$(BIN)/python -m benchmarks.quality

clean:  ## remove what was installed, trained and measured; merged models in results/ stay
	rm -rf .venv site zoo/models benchmarks/work .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

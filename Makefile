# One virtual environment, made from constraints.txt; every other target starts from it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test check lint types layers clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv from constraints.txt; does nothing when it is up to date

# The stamp is touched last, so that an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "raysys needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | tail -n 1):" \
	    "run 'make PYTHON=/path/to/python3.11'" >&2; exit 1; }
	@echo "Installing raysys and its tools into $(VENV): one to three minutes, once."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet \
	  --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

demo: setup ## The whole loop on a year of a real shop's purchases, on this machine
	@$(BIN)/python demo/run.py

serve: setup ## Serve what `make demo` trained, to play with
	@$(BIN)/python demo/serve.py

test: check ## Everything that CI runs
	$(BIN)/python -m pytest tests/cluster

# Unit tests share nothing, so each core takes its files; one cluster serves all cluster tests.
check: lint types layers ## Lint, types, layers and unit tests, without a Ray cluster
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal tests/unit raysys

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy --strict raysys

layers: setup
	$(BIN)/lint-imports

clean: ## Remove the virtual environment and everything built
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

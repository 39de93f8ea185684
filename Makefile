# All the set-up there is. Each command makes .venv first (once: the stamp file says that it is done).
#   make run     trains the demo and tells what it learnt
#   make test    the tests
#   make slurm   those on a Slurm of two nodes, where tests/slurm/setup.sh has installed one
#   make smoke   every recipe for a few steps, on a small drawn world
#   make check   lint, format and types

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

# The first of these that is there, runs, and is Python 3.11 or 3.12; `make PYTHON=/path/to/python` chooses another.
PYTHON ?= $(shell for name in python3.11 python3 python3.12; do \
	$$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && command -v $$name && break; \
	done)

.PHONY: run test slurm smoke check

run: $(STAMP)
	$(BIN)/python run.py

test: $(STAMP)
	$(BIN)/python -m pytest -q

slurm: $(STAMP)
	$(BIN)/python -m pytest -q -m slurm

smoke: $(STAMP)
	@mkdir -p runs/smoke
	@for file in conf/experiment/*.yaml; do \
		name=$$(basename $$file .yaml); \
		$(BIN)/python run.py experiment=$$name debug=smoke > runs/smoke/$$name.txt 2>&1 \
			&& echo "$$name" || { tail -20 runs/smoke/$$name.txt; echo "$$name FAILED"; exit 1; }; \
	done

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and pinned: whatever is installed later must take this torch and not bring its own.
$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "Python 3.11 or 3.12 is needed, and neither python3.11, python3 nor python3.12 is one. Install it, or: make PYTHON=/path/to/python"; \
		exit 1; fi
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else "Python 3.11 or 3.12 is needed; $(PYTHON) is " + sys.version.split()[0])'
	@echo "installing into $(VENV) with $(PYTHON) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) torchvision
	@$(PIP) -e ".[dev,metrics,video,slurm]"
	@touch $@

# `make demo` and `make test` need Python >= 3.11 and nothing else: they set up $(VENV) themselves.
#   make demo ARGS="--tokens 20k --out runs/short"     passes ARGS on to `nestlearn train`
#   make test ARGS="-k continuum"                      passes ARGS on to pytest

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
CPP := $(wildcard src/nestlearn/ops/native/*.h src/nestlearn/ops/native/*.cpp)

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean

help:
	@echo "make demo    train a HOPE language model on this machine and write a report (a few minutes)"
	@echo "make test    run the whole test suite"
	@echo "make lint    ruff, clang-format, pyright and the import floors"
	@echo "make format  let ruff and clang-format rewrite the layout of the code"
	@echo "make clean   remove $(VENV)"

demo: $(READY)
	$(BIN)/nestlearn train $(ARGS)

# One thread per worker: torch's own threads would fight over the cores.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV)

# The stamp is written last, so that a broken installation is tried again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: name another one, as in  make demo PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

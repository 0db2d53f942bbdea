# Two commands for a newcomer: `make demo` (install, corpus, three seeds, table) and `make test`.
# Everything is installed into .venv; .venv/installed is written last, so a half-made .venv is noticed and made again.

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,$(if $(shell $(name) -c \
	'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(name))))
BIN := .venv/bin
STAMP := .venv/installed
PYTEST_FLAGS ?=
# One process more than the two cores of a small machine: some tests wait. A file's tests stay together, they share runs.
WORKERS ?= 3
SLOW_WORKERS ?= 2

# A .venv whose interpreter no longer starts (moved, or its Python removed) counts as not made.
ifneq ($(wildcard $(STAMP)),)
ifneq ($(shell $(BIN)/python -c 'print("ok")' 2>/dev/null),ok)
$(shell rm -f $(STAMP))
endif
endif

.PHONY: help install demo test test-slow lint format clean

help:
	@echo "make demo       install, then three seeds end to end on this machine's CPU, and their table"
	@echo "make test       install, then format, lint, types and the default test suite"
	@echo "make test-slow  the tests marked slow"
	@echo "make lint       format check, lint and types;   make format  rewrite the format"
	@echo "make clean      remove .venv and caches (runs/ stays)"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 found; install one or name it: make PYTHON=/path/to/python3"; exit 2; }
	@echo "==> installing into .venv with $(PYTHON) (a first installation takes a few minutes)"
	@if [ ! -e $(STAMP) ] && [ -e .venv ]; then echo "==> .venv is incomplete: making it again"; rm -rf .venv; fi
	@rm -f $(STAMP)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv \
		|| { rm -rf .venv; echo "make: $(PYTHON) cannot make a venv (on Debian: apt-get install python3-venv)"; exit 2; }
	@echo "==> pip install -c constraints.txt -e .[dev]"
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)
	@echo "==> installed"

demo: $(STAMP)
	@echo "==> corpus: runs/corpus"
	@$(BIN)/seedsweep data builtin --out runs/corpus --reuse
	@echo "==> sweep: jobs/specs/demo.yaml -> runs/demo"
	@$(BIN)/seedsweep run jobs/specs/demo.yaml; code=$$?; \
		if [ $$code -le 1 ]; then $(BIN)/seedsweep table runs/demo || code=$$?; fi; exit $$code

test: lint
	@echo "==> pytest (default suite)"
	@$(BIN)/python -m pytest -q -rs -n $(WORKERS) --dist loadfile $(PYTEST_FLAGS)

test-slow: $(STAMP)
	@echo "==> pytest (slow)"
	@$(BIN)/python -m pytest -q -rs -m "slow and not alone" -n $(SLOW_WORKERS) --dist loadfile $(PYTEST_FLAGS); code=$$?; \
		echo "==> pytest (slow, one after the other)"; $(BIN)/python -m pytest -q -rs -m "slow and alone" $(PYTEST_FLAGS) && exit $$code

lint: $(STAMP)
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> mypy"
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

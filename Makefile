# Every target makes what it needs: from a fresh clone, Python >= 3.10 and make are enough.
#   make test PYTHON=python3.12     another interpreter (for a new .venv)
#   make test ARGS="-k cg -x"       more arguments for pytest

PYTHON ?= python3
VENV    = .venv
ARGS    =
PY      = $(VENV)/bin/python
PIP     = $(PY) -m pip --disable-pip-version-check install --quiet
# One stamp for each group of optional dependencies in pyproject.toml.
STAMPS  = $(VENV)/.examples $(VENV)/.docs $(VENV)/.dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# `make -j` runs one recipe after the other: two installs into one environment would collide.
.NOTPARALLEL:
.PHONY: help demo test lint format docs bench wheel clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.examples ## Implicit MAML in a minute: see it learn
	@$(PY) examples/demo.py $(ARGS)

test: $(VENV)/.dev ## Run all tests, docstring examples included
	@$(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile --durations 10 $(ARGS)

lint: $(VENV)/.dev ## Check style (ruff) and types (mypy)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.dev ## Rewrite the code in the project's style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(VENV)/.docs ## Build the documentation into site/
	$(PY) -m mkdocs build --strict

bench: $(VENV)/.dev ## Run the benchmarks
	@$(PY) -m benchmarks $(ARGS)

wheel: $(VENV)/.base ## Build a wheel into dist/
	$(PY) -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
	@ls dist

clean: ## Remove build outputs and caches
	rm -rf build dist site htmlcov .coverage .coverage.* coverage.xml
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find implicit_optim tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + \
	    2>/dev/null || true

distclean: clean ## Remove the environment as well
	rm -rf $(VENV)

# ------------------------------------------------------------------------------- the environment

$(VENV)/.base:
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "implicit_optim needs Python 3.10 or newer, but there is no '$(PYTHON)' here." >&2; \
	    echo "Name yours: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "implicit_optim needs Python 3.10 or newer; '$(PYTHON)' is" \
	        "$$("$(PYTHON)" --version 2>&1)." >&2; \
	    echo "Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Making an environment in $(VENV) ..."
	@"$(PYTHON)" -m venv --clear $(VENV)
	@$(PIP) "pip>=21.3"
	@touch $@

$(STAMPS): $(VENV)/.%: $(VENV)/.base pyproject.toml
	@echo "Installing implicit_optim[$*] into $(VENV)" \
	    "(torch is large: the first time takes a few minutes) ..."
	@$(PIP) --editable ".[$*]"
	@touch $@

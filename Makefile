# Every target makes what it needs: from a fresh clone, Python >= 3.10 and make are enough.
#   make test PYTHON=python3.12     another interpreter (for a new .venv)
#   make test ARGS="-k cg -x"       more arguments for pytest
#   make test WITH="torch==2.14.0"  more arguments for pip (for a new environment)

PYTHON ?= python3
VENV    = .venv
ARGS    =
WITH    =
TEST    = dev
PY      = $(VENV)/bin/python
PIP     = $(PY) -m pip --disable-pip-version-check install --quiet
# One stamp for each group of optional dependencies in pyproject.toml.
STAMPS  = $(VENV)/.examples $(VENV)/.docs $(VENV)/.test $(VENV)/.dev $(VENV)/.zoo
# The lower bound of torch in pyproject.toml, as pip's exact version.
OLDEST  = $(shell sed -n 's/^dependencies = .*"torch>=\([0-9.]*\)".*/torch==\1/p' pyproject.toml)
# Files in the order of their names: ordered by their number of tests, the few long ones would come last.
PYTEST  = -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations 10

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# `make -j` runs one recipe after the other: two installs into one environment would collide.
.NOTPARALLEL:
.PHONY: help demo test test-oldest test-wheel lint format docs bench zoo zoo-here dist clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.examples ## Implicit MAML in a minute: see it learn
	@$(PY) examples/demo.py $(ARGS)

test: $(VENV)/.$(TEST) ## Run all tests, docstring examples included
	@$(PY) $(PYTEST) $(ARGS)

test-oldest: ## The same with the oldest torch of pyproject.toml, without torchvision
	@$(MAKE) --no-print-directory test VENV=.venv-oldest TEST=test WITH="$(OLDEST)"

# The tests come out of the sdist, so that it is complete; they read the wheel's sources and examples.
test-wheel: dist ## The same with the installed wheel, away from the source tree
	@echo "Installing the wheel into a new .venv-wheel" \
	    "(torch is large: the first time takes a few minutes) ..."
	@"$(PYTHON)" -m venv --clear .venv-wheel
	@.venv-wheel/bin/python -m pip --disable-pip-version-check install --quiet \
	    "$$(ls dist/*.whl)[dev]" $(WITH)
	@away="$$(mktemp -d)" && trap 'rm -rf "$$away"' EXIT && \
	    tar -xzf dist/*.tar.gz --strip-components 1 -C "$$away" && rm -r "$$away/implicit_optim" && \
	    cd "$$away" && unset PYTHONPATH && python="$(CURDIR)/.venv-wheel/bin/python" && \
	    "$$python" -c 'import sys, implicit_optim as i; print("Testing", i.__file__); \
	        sys.exit(not i.__file__.startswith(sys.prefix))' && \
	    "$$python" $(PYTEST) --pyargs ./tests implicit_optim $(ARGS)

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

zoo: ## Try models of other people against plain torch, into docs/models-tried.md
	@$(MAKE) --no-print-directory zoo-here VENV=.venv-zoo

zoo-here: $(VENV)/.zoo
	@$(PY) -m benchmarks.models $(ARGS)

dist: $(VENV)/.base ## Build the sdist, and from it the wheel, into dist/
	@rm -rf dist
	@$(PIP) build
	@$(PY) -m build --outdir dist .

clean: ## Remove build outputs and caches
	rm -rf build dist site htmlcov .coverage .coverage.* coverage.xml
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find implicit_optim tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + \
	    2>/dev/null || true

distclean: clean ## Remove the environment as well
	rm -rf $(VENV) .venv-oldest .venv-wheel .venv-zoo

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
	@$(PIP) --editable ".[$*]" $(WITH)
	@touch $@

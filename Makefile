# Set-up is part of every command: each makes the environment that it needs, unless it is fresh.
# PYTHON=python3.12 picks another interpreter, which gets an environment of its own.

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help train test quick sample lint suite typed docs coverage compiled tpu clean FORCE
.NOTPARALLEL:

# A command counts if it runs: a version manager's shim can stand on PATH for nothing.
new_enough = $(shell $(1) -c 'import sys; print(sys.version_info >= (3, 11))' 2>/dev/null)
candidates := python3.11 python3 python3.12 python3.13 python3.14
ifdef PYTHON
  VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
else
  PYTHON := $(firstword $(foreach p,$(candidates),$(if $(filter True,$(call new_enough,$(p))),$(p))))
  VENV := .venv
endif
ifneq ($(call new_enough,$(PYTHON)),True)
  $(error Python 3.11 or newer is needed, found '$(PYTHON)'; name one with PYTHON=...)
endif
python := $(VENV)/bin/python
# Types are checked anew only where a file has changed, in another checkout too.
export MYPY_CACHE_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/wsekern/mypy
# Two processes, whatever the machine: each emulates sixteen devices. WORKERS=0 is this one alone.
WORKERS ?= 2
pytest := $(python) -m pytest -n $(WORKERS) --dist worksteal
# Where another Python, JAX, Flax, Optax or TensorStore can make a difference. Pages, examples, benchmarks
# and plans are made of these.
differing := tests/wsekern tests/sharding tests/models --ignore=tests/models/planning \
  tests/training/test_step.py tests/training/test_checkpoint.py \
  tests/training/test_trainer.py::test_a_run_leaves_everything_in_its_folder

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 14

train: $(VENV)/installed-train ## train a small language model; ARGS='--steps 1000' adds flags
	$(python) -m training --preset nano --wafer 2x4 --steps 300 --platform cpu $(ARGS)

test: lint docs suite typed ## lint, check types, build the pages, run every test

quick: $(VENV)/installed-test ## run the tests that are not slow; ARGS='-k ring' goes to pytest
	$(pytest) -m 'not slow and not tpu' $(ARGS)

sample: $(VENV)/installed-test ## test what a Python can change, on one grid each; PYTHON=python3.12
	$(pytest) $(differing) -m 'not slow and not tpu' --one-of-each $(ARGS)

lint: $(VENV)/installed-test ## style, formatting and types, over all folders
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

suite: $(VENV)/installed-test ## run every test that needs no compiler of TPUs, and list the slowest twenty
	$(pytest) -m 'not tpu' --durations=20 $(ARGS)

compiled: $(VENV)/installed-test $(VENV)/installed-tpu ## compile a small set of programs for TPUs that need not be there
	$(pytest) -m 'tpu and not slow' --durations=10 $(ARGS)

tpu: $(VENV)/installed-test $(VENV)/installed-tpu ## compile every public operation for TPUs that need not be there, in an hour
	$(pytest) -m tpu --durations=10 $(ARGS)
	$(python) -m benchmarks marks

typed: $(VENV)/installed-test ## run one test a kernel, compiled as for users, with shapes checked
	XLA_AS_SHIPPED=1 $(pytest) tests/wsekern/kernels -m 'not refuses and not slow and not tpu' --one-of-each \
	  --jaxtyping-packages=wsekern,typechecker.checked $(ARGS)

docs: $(VENV)/installed-docs ## build the documentation into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict --quiet
	@echo "open site/index.html"

coverage: $(VENV)/installed-test ## run the tests that are not slow, and list the lines that none reaches
	$(pytest) -m 'not slow and not tpu' --cov=wsekern --cov=sharding --cov=models --cov=training \
	  --cov-report=term-missing:skip-covered $(ARGS)

clean: ## remove environments and caches; runs stay, and compiled programs in ~/.cache/wsekern
	rm -rf .venv .venv-* site .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The last line runs only if all before it did, so an interrupted installation is taken up again.
$(VENV)/installed-%: pyproject.toml constraints.txt $(if $(wildcard $(python)),,FORCE)
	@echo "installing into $(VENV), which takes about a minute the first time"
	@$(python) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(python) install --quiet pip; }
	@$(python) -m pip install --quiet --disable-pip-version-check -e '.[$*]' -c constraints.txt
	@touch $@

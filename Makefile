# `make demo` and `make test` need nothing prepared: a Python 3.11 or newer and, on Debian, its venv package, which is
# installed if you are root. Everything else goes into .venv.
#
# `make test` tests against a real QEMU as well. As root on Debian it installs one; where none can be had it says so, and
# those tests are skipped.
#
# The tests and the demo run the built wheel, never the tree: what is not packaged is not tested.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
PYTHON := $(VENV)/bin/python
SOURCES := $(shell find core plugins/*/whimbrel_* examples -name '*.py' -not -path '*/__pycache__/*') pyproject.toml README.md LICENSE

.PHONY: help demo test test-slow test-long sweep qemu spin lint types docs bench plots fuzz-short develop clean

help: ## what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/wheel ## move 512 MiB under constant writes from one process to another, and compare every byte
	$(VENV)/bin/whimbrel demo $(ARGS)

test: $(VENV)/wheel qemu spin ## the tests, on the wheel, on all cores (less than 5 minutes on two)
	WHIMBREL_TESTS_THE_WHEEL=1 $(PYTHON) -m pytest -n auto --dist worksteal -m "not slow and not long" $(ARGS)

test-slow: $(VENV)/wheel qemu spin ## those of many seconds: 5,000 cuts of a handover, crashes, the tutorial (some 3 minutes)
	WHIMBREL_TESTS_THE_WHEEL=1 $(PYTHON) -m pytest -n auto --dist worksteal -m "slow and not long" $(ARGS)

test-long: $(VENV)/wheel qemu spin ## those of many minutes
	$(PYTHON) -m pytest -m "long" --timeout=3600 $(ARGS)

sweep: $(VENV)/wheel ## cut a handover behind every byte, some 391 000 times in all; goes on where it was, and writes docs/never-two.md
	$(PYTHON) -m tests.sweep --write $(ARGS)

qemu: ## have a QEMU here to test against, if it can be had
	@tools/make-qemu

spin: ## have spin here, which checks the model of the handover, if it can be had
	@tools/make-spin

lint: $(VENV)/tools ## ruff and the direction of imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	PYTHONPATH=$(subst $() ,:,$(strip $(IMPORT_PATHS))) $(VENV)/bin/lint-imports --no-cache

types: $(VENV)/tools ## mypy --strict
	$(VENV)/bin/mypy

docs: $(VENV)/wheel ## write the generated pages anew: settings, states, errors
	$(PYTHON) docs/generate.py

bench: $(VENV)/wheel $(VENV)/bench qemu ## measure whimbrel beside a real QEMU, some 15 minutes; --quick for one
	$(PYTHON) -m benchmarks.bench $(ARGS)

plots: $(VENV)/wheel $(VENV)/bench ## the plots and tables of docs/performance.md, from what make bench has kept
	$(PYTHON) -m benchmarks.plots
	$(PYTHON) -m benchmarks.report

fuzz-short: $(VENV)/wheel $(VENV)/fuzz ## every fuzz target with atheris, two at a time, FUZZ_SECONDS (60) each; some 7 minutes
	$(PYTHON) -m fuzz.run --jobs 2 $(ARGS)

develop: $(VENV)/tools ## an editable install instead of the wheel, for working on whimbrel
	$(VENV)/bin/pip install --quiet --no-build-isolation --editable .
	rm -f $(VENV)/wheel

clean: ## remove everything that make has made
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

IMPORT_PATHS := core plugins/transports plugins/savevm plugins/codecs plugins/notifiers plugins/witnesses examples

$(VENV)/bin/python:
	tools/make-venv $(VENV)

$(VENV)/tools: $(VENV)/bin/python pyproject.toml tools/requirements.py
	$(PYTHON) tools/requirements.py > $(VENV)/requirements.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --requirement $(VENV)/requirements.txt
	@touch $@

# What only measuring needs: it is not installed for anything else.
$(VENV)/bench: $(VENV)/tools pyproject.toml tools/requirements.py
	$(PYTHON) tools/requirements.py bench > $(VENV)/requirements-bench.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --requirement $(VENV)/requirements-bench.txt
	@touch $@

# And what only fuzzing needs.
$(VENV)/fuzz: $(VENV)/tools pyproject.toml tools/requirements.py
	$(PYTHON) tools/requirements.py fuzz > $(VENV)/requirements-fuzz.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --requirement $(VENV)/requirements-fuzz.txt
	@touch $@

$(VENV)/wheel: $(VENV)/tools $(SOURCES)
	rm -rf dist
	$(VENV)/bin/pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --force-reinstall dist/whimbrel-*.whl
	@touch $@

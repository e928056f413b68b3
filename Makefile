# make setup   virtual environment in .venv (all other targets do this first, when needed)
# make demo    export the demo pair, answer two questions (drafts suit the first), prove parity, measure the gain
# make test    lint, then all tests that aren't marked slow
# make test-all  lint, then all tests
# make dist    sdist and wheel in dist/, checked
# make bench   the full comparison on the demo pair, with a plot
# make lint    ruff and mypy
# make clean   remove .venv, caches and the demo bundle

ifndef PYTHON
# Ask each to run: a name on PATH may be a shim for a version that isn't installed.
PYTHON := $(shell for name in python3.11 python3; do $$name -c "" 2>/dev/null && echo $$name && break; done)
endif

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
CONSTRAINTS := $(wildcard constraints/*.txt)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet

BUNDLE := engines/smollm2-135m
PROMPTS := examples/smollm2-135m-instruct-dflash/heldout_prompts.json
# A file of tests stays on one worker: its fixtures export bundles.
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: setup setup-all dist demo test test-all bench lint clean

setup: $(STAMP)

# setuptools comes first and --no-build-isolation follows, so that the build tool is pinned as well.
$(STAMP): Makefile setup.cfg pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "No Python found. Install Python 3.11, or run: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Installing into $(VENV). The first time this downloads PyTorch and takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -c constraints/constraints.txt setuptools
	$(PIP_INSTALL) -c constraints/constraints.txt --no-build-isolation -e ".[export,quantize,test,bench]"
	$(PIP_INSTALL) --no-deps -r constraints/no-deps.txt
	touch $@

setup-all: $(VENV)/.stamp-all

$(VENV)/.stamp-all: $(STAMP)
	$(PIP_INSTALL) -c constraints/constraints.txt --no-build-isolation -e ".[release]"
	touch $@

dist: setup-all
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

# What of the runtime shapes a bundle: its format, and the checks of it.
FORMAT := dflash_rt/bundle/manifest.py dflash_rt/bundle/contract.py dflash_rt/bundle/rules.py dflash_rt/bundle/schema.py

# Exported again when the recipe, the drafter, the exporter or the format is newer than the bundle.
$(BUNDLE)/manifest.json: $(BUNDLE).yaml $(wildcard examples/smollm2-135m-instruct-dflash/*) \
		$(wildcard dflash_export/*.py) $(FORMAT) $(STAMP)
	$(BIN)/dflash-export build --recipe $(BUNDLE).yaml --output $(BUNDLE) --force

demo: $(BUNDLE)/manifest.json
	$(BIN)/dflash-rt generate $(BUNDLE) --chat --prompt "Write a Python function that reverses a string." \
		--max-new-tokens 96 --stats
	$(BIN)/dflash-rt generate $(BUNDLE) --chat --prompt "Why is the sky blue?" --max-new-tokens 96 --stats
	$(BIN)/dflash-export verify $(BUNDLE) --recipe $(BUNDLE).yaml --chat --prompts $(PROMPTS) --limit 4 \
		--max-new-tokens 64
	$(BIN)/dflash-bench run $(BUNDLE) --recipe $(BUNDLE).yaml --chat --prompts $(PROMPTS) --limit 4 \
		--max-new-tokens 64 --repeats 1 --compare hf --num-draft-tokens 3

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: lint setup-all
	$(BIN)/python -m pytest -m "" $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(BUNDLE)/manifest.json
	$(BIN)/dflash-bench run $(BUNDLE) --recipe $(BUNDLE).yaml --chat --prompts $(PROMPTS) --limit 8 \
		--compare hf,reference,genai --num-draft-tokens 3 --num-draft-tokens 7 --plot $(BUNDLE)/reports/bench.png

clean:
	rm -rf $(VENV) $(BUNDLE) *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

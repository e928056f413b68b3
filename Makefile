# make setup      virtual environment in .venv (all other targets do this first, when needed)
# make setup-all  what make test-all needs besides
# make demo       export the demo pair, answer two questions (drafts suit the first), prove parity, measure the gain
# make check      lint, the runtime's tests, one pair
# make test       lint, then all tests that aren't marked slow
# make test-all   lint, then all tests; SHARD=2/4 runs the second quarter of them
# make dist       sdist and wheel in dist/, checked
# make bench      the full comparison on the demo pair, with a plot
# make lint       ruff, mypy and import-linter
# make clean      remove .venv, caches and the demo bundle

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
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
# One test that goes the whole way, from checkpoints to tokens.
ONE_PAIR := "tests/end_to_end/test_reference_loop.py::test_one_pair[mixed]"

.PHONY: setup setup-all dist demo check test test-all bench lint clean

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

# What makes a bundle: the exporter, and the format with its checks.
EXPORTER := $(shell find dflash_export dflash_rt/bundle -name "*.py")

# Exported again when the recipe, the drafter, the exporter or the format is newer than the bundle.
$(BUNDLE)/manifest.json: $(BUNDLE).yaml $(wildcard examples/smollm2-135m-instruct-dflash/*) \
		$(EXPORTER) $(STAMP)
	$(BIN)/dflash-export build --recipe $(BUNDLE).yaml --output $(BUNDLE) --force

demo: $(BUNDLE)/manifest.json
	$(BIN)/dflash-rt generate $(BUNDLE) --chat --prompt "Write a Python function that reverses a string." \
		--max-new-tokens 96 --stats
	$(BIN)/dflash-rt generate $(BUNDLE) --chat --prompt "Why is the sky blue?" --max-new-tokens 96 --stats
	$(BIN)/dflash-export verify $(BUNDLE) --recipe $(BUNDLE).yaml --chat --prompts $(PROMPTS) --limit 4 \
		--max-new-tokens 64
	$(BIN)/dflash-bench run $(BUNDLE) --recipe $(BUNDLE).yaml --chat --prompts $(PROMPTS) --limit 4 \
		--max-new-tokens 64 --repeats 1 --compare hf --num-draft-tokens 3

check: lint
	$(PYTEST) tests/rt $(ONE_PAIR) $(PYTEST_ARGS)

test: lint
	$(PYTEST) $(PYTEST_ARGS)

test-all: lint setup-all
	$(PYTEST) -m "" $(if $(SHARD),--shard $(SHARD)) $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(BUNDLE)/manifest.json
	$(BIN)/dflash-bench run $(BUNDLE) --recipe $(BUNDLE).yaml --chat --prompts $(PROMPTS) --limit 8 \
		--compare hf,reference,genai --num-draft-tokens 3 --num-draft-tokens 7 --plot $(BUNDLE)/reports/bench.png

clean:
	rm -rf $(VENV) $(BUNDLE) .cache *.egg-info .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .hypothesis

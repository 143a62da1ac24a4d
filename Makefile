# make quickstart    install, and run a campaign on this machine
# make test          everything that a change must pass; starts a Slurm cluster on this host and stops it again
# make test-nightly  the tests that take minutes
# make soak          an hour of campaigns on a Slurm cluster on which everything fails at random; MINUTES=5 SIZE=small for less
# make lint, format  style, types and layers; let ruff lay the code out
#
# The environment is built when it is missing or its inputs have changed.  On Linux pip takes the CUDA build of
# torch, several gigabytes, unless PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL leads it to a CPU build.

VENV ?= .venv
PYTHON ?= python3
export VENV # for tests/run

BIN = $(VENV)/bin
INPUTS = setup.cfg pyproject.toml constraints.txt
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
SHELL_SCRIPTS = find .ci jobscripts tests -type f -exec awk '/^\#!.*sh$$/ {print FILENAME} {nextfile}' {} +

.PHONY: help quickstart test test-nightly soak lint format packages
.NOTPARALLEL:

help:
	@sed -n 's/^# make/make/p' Makefile

quickstart: $(VENV)/.installed
	$(BIN)/hpcft run campaigns/quickstart.yaml

test: packages lint $(VENV)/.installed-codes
	tests/run

test-nightly: packages $(VENV)/.installed-codes
	tests/run -m nightly

MINUTES ?= 60
SIZE ?= large
SEED ?= 1

soak: packages $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --minutes $(MINUTES) --size $(SIZE) --seed $(SEED)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	@command -v shellcheck >/dev/null || { echo 'make lint: shellcheck is not installed; run: make packages' >&2; exit 1; }
	shellcheck $$($(SHELL_SCRIPTS))

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

# What pip cannot install: Slurm, MPI, Quantum ESPRESSO, the libraries of GPAW, shellcheck.
packages:
	env -u HPCFT_SLURM_DIR tests/slurm/cluster/up --install

# Without pip (Debian puts it into python3-venv) an environment is half made: so pip is what shows that it is there.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'make: $(PYTHON) is not Python 3.11 or later; name one that is, as in: make PYTHON=python3.11' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(INPUTS) | $(BIN)/pip
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: $(INPUTS) | $(BIN)/pip
	$(PIP_INSTALL) -e '.[test]'
	@touch $@ $(VENV)/.installed

# Compiles GPAW, for which `packages` brings what it needs.
$(VENV)/.installed-codes: $(INPUTS) | $(VENV)/.installed-test
	$(PIP_INSTALL) -e '.[test,gpaw,xtb]'
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed

# make train   set up, then train a small GPT with power retention on real text
# make test    the test suite, in the same environment
# make faults  break a hundred runs and count which survive (docs/faults.md); about ten minutes
# make check   lint, types, kernels and tests; .ci/run does the same on a clean machine, with a real Slurm as well
# The first that runs and is new enough: a name on the PATH may be a version manager's stub.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS := $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 8 ] && echo 8 || echo $$n)
# Overrides for the run: make train ARGS='model=10m trainer.max_tokens=2e7'
ARGS ?=
# What to test: make test TESTS=tests/ops
TESTS ?= tests

.PHONY: train test test-slurm faults lint types kernels check setup clean

# One thread: the small pieces of so small a model gain little from more on a CPU, and wait long where the cores are shared.
train: setup
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/powertrain train experiment=quickstart $(ARGS)

# One thread per worker: the workers themselves fill the cores. A file stays on one, which makes what it shares once.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slurm" $(TESTS)

# A real Slurm on this machine (root; slurmctld, slurmd and munge installed). One worker: its tests share that Slurm.
test-slurm: setup
	POWERTRAIN_REQUIRE_SLURM=1 OMP_NUM_THREADS=1 $(BIN)/pytest -m slurm tests/cluster

faults: setup
	$(BIN)/python -m tests.faults --output docs/benchmarks/faults.json $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Compiles every kernel; warnings, and spills in hot kernels, are errors. Skipped, with a line, where there is no nvcc.
kernels: setup
	@if $(BIN)/python -c 'from powertrain.native.toolchain import find_nvcc; find_nvcc()' 2> /dev/null; then \
	  $(BIN)/powertrain kernels build --check; \
	else \
	  echo "kernels: not compiled, since there is no nvcc of CUDA 12.4 or later here"; \
	fi

check: lint types kernels test

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || \
	  { echo "powertrain needs Python 3.11 or newer, and none is on the PATH: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian, Ubuntu: python3-venv)"; exit 1; }
	@echo "installing into $(VENV), a minute or two"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[dev]'
	@# pip would compile them one after another; some packages hold files for other versions of Python.
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null 2>&1 || true
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

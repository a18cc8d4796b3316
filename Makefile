# make demo | quick | test | lint | drills | bench | experiments | test-gpu | gpu-report, each with its own set-up
# EXTRA=cuda12 for CUDA 12, PYTHON=python3.12 for another Python
PYTHON ?= python3
VENV ?= .venv
EXTRA ?= cuda13
BIN = $(VENV)/bin
NPROC ?= 2
MARK ?= not slow and not gpu
# No tests of the kind that is asked for is no failure.
PYTEST = $(BIN)/python -m pytest $(ARGS) -m
OR_NONE = || [ $$? = 5 ]

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRA),dev]'
	touch $@

demo: $(VENV)/ready  ## pack Fashion-MNIST, train with two processes, show the result
	$(BIN)/torchrun --nproc_per_node=$(NPROC) -m dist_train --run.name demo --monitor.wandb offline $(ARGS)

quick: lint  ## what a change is tried with: lint, types, and the tests that start no trainer; under two minutes
	$(PYTEST) 'not integration and not slow and not gpu and not slurm'

test: $(VENV)/ready  ## the tests that mostly wait, for Slurm and for what shows a run, beside all others
	$(MAKE) -j2 -Oline test-waiting test-rest

test-waiting:
	$(PYTEST) '($(MARK)) and (slurm or shown)' $(OR_NONE)

test-rest:
	$(PYTEST) '($(MARK)) and not (slurm or shown)' $(OR_NONE)

test-gpu:
	$(MAKE) test MARK=gpu

lint: $(VENV)/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

drills: $(VENV)/ready  ## break runs in every way and print what came of it
	$(BIN)/python -m pytest -q -s tests/test_drills.py tests/test_failing.py tests/test_leaving.py $(ARGS)

experiments: $(VENV)/ready  ## the paper's own comparisons, and why re-implementations fail: tables and pictures in docs/experiments
	$(BIN)/python -m dist_train experiments $(ARGS)

bench: $(VENV)/ready  ## what things cost, as ratios within one run; PHOTOS=DIR for real photographs, ARGS="step net" for some tables
	$(BIN)/python -m tests.benchmarks $(ARGS)

gpu-report: $(VENV)/ready  ## what only a machine with GPUs shows: what fits into ten minutes, the most telling first; ARGS='--minutes 30' for all
	$(BIN)/python -m dist_train gpu-report $(ARGS)

.PHONY: demo quick test test-waiting test-rest test-gpu lint drills bench experiments gpu-report

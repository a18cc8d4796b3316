# make demo | quick | test | lint | drills | bench | experiments | docs-check | test-gpu | gpu-report, each with its own
# set-up. EXTRA=cuda12 for CUDA 12, PYTHON=python3.12 for another Python.
SHELL = /bin/bash
PYTHON ?= python3
VENV ?= .venv
EXTRA ?= cuda13
BIN = $(VENV)/bin
NPROC ?= 2
EPOCHS ?= 1
RUN ?= demo
WORKERS ?= 3
MARK ?= not slow and not gpu
# No tests of the kind that is asked for is no failure.
PYTEST = $(BIN)/python -m pytest $(ARGS) -m
OR_NONE = || [ $$? = 5 ]
FASHION = data/fashion-mnist
PACKAGE = dataset-fashion-mnist
PREFETCH = from pipelines.torchvision_sets import prefetch; raise SystemExit(prefetch("fashion-mnist", "$(FASHION)/raw"))
# Debian's package without root: unpacked where `pack` looks for it.
APT = apt-get -o Dir::State::Lists=$(CURDIR)/$(FASHION)/raw/lists -o Dir::Cache=$(CURDIR)/$(FASHION)/raw/cache \
	-o APT::Sandbox::User=root -o Acquire::Retries=0 -o Acquire::http::Timeout=20
# Of what pip says, the name, version and size of each large package.
BRIEFLY = sed -un -e '/metadata/d' -e 's/^Installing collected.*/unpacking them: a minute or two/p' \
	-e 's/^ *\(Downloading\|Using cached\) \(.*\/\)\?\([^-]*\)-\([^-]*\)-.* (\(.* [MG]B\))$$/    \3 \4, \5/p' \
	-e 's/^Processing .*\/\([^-]*\)-\([^-]*\)-.*[.]whl.*/    \1 \2/p'
NEXT = '$(BIN)/python -m dist_train evaluate $(RUN)' 'errors class by class' \
	'$(BIN)/python -m dist_train figures $(RUN)' 'kernels and nearest images' \
	$(if $(filter 1 2,$(EPOCHS)),'make demo EPOCHS=3$(if $(filter-out demo,$(RUN)), RUN=$(RUN))' 'goes on to epoch 3; the learning rate is divided by 10 after epoch 2')

$(VENV)/ready: pyproject.toml constraints.txt
	@echo "virtual environment $(VENV), with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "installing dist_train[$(EXTRA),dev] into it: some minutes, most of them for torch and its libraries"
	@set -o pipefail; PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -c constraints.txt -e '.[$(EXTRA),dev]' | $(BRIEFLY)
	@touch $@

# torchvision's mirrors first, unless the package is installed; then Debian's, where there is apt.
$(FASHION)/val/manifest.json: | $(VENV)/ready
	@echo "Fashion-MNIST: from /usr/share/datasets, or else from torchvision's mirrors"
	@$(BIN)/python -c '$(PREFETCH)' || { code=$$?; [ $$code != 130 ] || exit 130; \
		if command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then \
		echo "Fashion-MNIST: from Debian's package $(PACKAGE)"; mkdir -p $(FASHION)/raw/lists && cd $(FASHION)/raw && \
		{ { $(APT) update && $(APT) download $(PACKAGE) && dpkg-deb -x $(PACKAGE)_*.deb half && mv half/usr .; } &>apt.log || \
		echo "apt does not have it either: see $(FASHION)/raw/apt.log"; \
		rm -rf lists cache half *.deb; }; fi; }
	@echo "packing Fashion-MNIST into $(FASHION)"
	@$(BIN)/python -m pipelines pack fashion-mnist $(FASHION)

ifneq ($(filter demo,$(MAKECMDGOALS)),)
ifneq ($(shell echo '$(EPOCHS)' | grep -cxE '[1-9][0-9]*'),1)
$(error EPOCHS is '$(EPOCHS)': give a number of epochs, 1 or more)
endif
endif

demo: $(VENV)/ready $(FASHION)/val/manifest.json  ## pack Fashion-MNIST, train EPOCHS with NPROC processes, show the result
	@echo "training $(RUN) to epoch $(EPOCHS) with $(NPROC) processes; Ctrl-C saves and stops, the same command continues"
	@$(BIN)/python -m dist_train.ranks.torchrun --standalone --nproc_per_node=$(NPROC) -m dist_train \
		--run.name $(RUN) --train.epochs $(EPOCHS) $(ARGS) || { code=$$?; [ $$code = 130 ] && exit; exit $$code; }; \
	$(BIN)/python -m dist_train figures runs/$(RUN) --only top5 --images 12 && \
	$(BIN)/python -m dist_train report runs/$(RUN) >/dev/null && \
	printf '\nWhat to type next:\n' && printf '    %-48s  %s\n' $(NEXT) && \
	echo 'Your own photographs: docs/first-run.md' && echo 'the page of the run, for a browser: runs/$(RUN)/report.html'

quick: lint  ## what a change is tried with: lint, types, and the tests that start no trainer; under two minutes
	$(PYTEST) 'not integration and not slow and not gpu and not slurm'

# Most of the time of a test is waiting, for trainers and for Slurm: several files of tests at a time. (pytest 9.2 knows
# no loadgroup of xdist 3.8: it says nothing, and spreads single tests.)
test: $(VENV)/ready  ## all tests but the slow ones
	$(PYTEST) '$(MARK)' -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(OR_NONE)

test-gpu: $(VENV)/ready
	$(PYTEST) gpu $(OR_NONE)

lint: $(VENV)/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs-check: $(VENV)/ready  ## numbers and tables of README.md, docs and configs against their records; then run the commands
	$(BIN)/python -m pytest -q tests/test_measured.py tests/test_docs.py $(ARGS)

drills: $(VENV)/ready  ## break runs in every way and print what came of it
	$(BIN)/python -m pytest -q -s tests/test_drills.py tests/test_failing.py tests/test_leaving.py $(ARGS)

experiments: $(VENV)/ready $(FASHION)/val/manifest.json  ## the paper's own comparisons, and an AlexNet that did not converge: tables and pictures in docs/experiments
	$(BIN)/python -m dist_train experiments $(ARGS)

bench: $(VENV)/ready  ## what things cost, as ratios within one run; PHOTOS=DIR for real photographs, ARGS="step net" for some tables
	$(BIN)/python -m tests.benchmarks $(ARGS)

gpu-report: $(VENV)/ready  ## what only a machine with GPUs shows: what fits into ten minutes, the most telling first; ARGS='--minutes 30' for all
	$(BIN)/python -m dist_train gpu-report $(ARGS)

.PHONY: demo quick test test-gpu lint docs-check drills bench experiments gpu-report

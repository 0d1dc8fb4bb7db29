# Each target sets up a fresh machine by itself: it needs Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two test processes of one thread each are faster on two cores than one of two.
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help install quickstart test test-all style types fast ddp docs format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "lightning_dp needs Python 3.11 or newer: set PYTHON=python3.11, say")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@echo "installing into $(VENV): PyTorch for Linux is a large download, one to several minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

install: $(VENV)/.installed  ## make .venv with everything

quickstart: install  ## train a private classifier of handwritten digits, about 20 s after installation
	$(BIN)/lightning-dp fit -c configs/base.yaml -c configs/experiments/quickstart.yaml
	@echo
	@echo "Charts:       $(BIN)/tensorboard --logdir runs"
	@echo "Privacy card: the line 'privacy card' above names the file"

test: install style types docs fast ddp  ## everything that CI checks

style:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

docs:  ## build the site into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

fast:
	$(THREADS) $(BIN)/python -m pytest -q -n 2 --dist loadfile

ddp:
	$(THREADS) $(BIN)/python -m pytest -q -m ddp

test-all: test  ## with the slow tests
	$(THREADS) $(BIN)/python -m pytest -q -m slow

format: install  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the targets made, but not runs/ and data/
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache

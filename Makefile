# Everything a new user or a contributor runs. Two commands set up a fresh machine: `make demo` and `make test`.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: help demo demo-sites docs extras test check test-slow test-sites test-example clean
.DEFAULT_GOAL := help

help:  ## This list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1\t\2/p' Makefile | expand -t 14

# The CPU build of PyTorch is enough for the demo and the tests; install your own torch into $(VENV) first to use another.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV): PyTorch, then FedProxy with 130 packages; once, about three minutes."
	@echo "Disk: 2 GB with PyTorch's CPU build; its CUDA build takes several GB more, and their download."
	@set -e; began=$$(date +%s); \
	$(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch; \
	echo "PyTorch is there after $$(($$(date +%s) - began)) s."; \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'; \
	echo "Installed in $$(($$(date +%s) - began)) s."
	@touch $@

# Flower, for real sites: they need nginx, too.
$(VENV)/.sites: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[flower]'
	touch $@

# Sphinx and what the site is made of.
$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

demo: $(VENV)/.installed  ## The main job: SmolLM2, four clients, compress, federate, fuse, evaluate, report
	$(BIN)/python -m fedproxy.fit recipe=fedproxy_llama resume=auto

demo-sites: $(VENV)/.sites  ## A hub and two sites on this machine, each with folders, keys and processes of its own; needs nginx
	$(BIN)/python -m fedproxy.sites.demo

docs: $(VENV)/.docs  ## The documentation as a site, docs/_build/html/index.html: half a minute, every warning is an error
	$(BIN)/python -m sphinx -W --keep-going -n -b html -c docs . docs/_build/html

extras: $(VENV)/.installed  ## All extras resolve together with the constraints
	$(BIN)/python -m pip install --quiet --dry-run --constraint constraints.txt '.[docs,flower,mlflow,wandb,tensorboard,quantization,privacy,dev]'

test: $(VENV)/.installed  ## Unit tests and the real model with small budgets
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m 'not slow and not browser and not gpu and not flower'

check: $(VENV)/.installed  ## Lint, types, and which file may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

test-slow: $(VENV)/.installed  ## The rest: slow, browser and gpu tests, each skipped with a reason where it cannot run
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m 'slow and not flower and not gpu and not browser'
	$(BIN)/python -m pytest -m 'browser or gpu'

test-sites: $(VENV)/.sites  ## Real sites over Flower on this machine; -m 'flower and slow' kills for half an hour
	$(BIN)/python -m pytest tests/sites -m 'flower and not slow'

test-example: $(VENV)/.installed  ## A plugin in a package of its own, installed and run
	$(BIN)/python -m pip install --quiet --no-deps --editable examples/fedproxy-huber
	$(BIN)/python -m pytest --rootdir examples/fedproxy-huber -c examples/fedproxy-huber/pyproject.toml examples/fedproxy-huber/tests

clean:  ## Remove the environment and what was built
	rm -rf $(VENV) build dist *.egg-info

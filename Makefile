# make help    these lines
# make train   trains a small GPT on all GPUs, or 2 CPU ranks, through the deepspeed launcher
# make test    lint, type check and all tests
# make test-fast  the same, without the tests that start processes: a few minutes
# make bench   the tables of one update and of one step, anew
# make gpu     bits, speed and memory on one GPU, by PYTHON as it is: eight minutes, docs/gpu.md
# make docs    serves the documentation as a site
# ARGS is passed on, for example: make test ARGS='-k layout' or make train ARGS='--resume RUN'
# All but help and gpu set up VENV (default .venv) first, once, with PYTHON (default python3).

# Three processes run the tests, a file each, for two cores: one of them has all that mostly waits, see
# tests/harness/lanes.py.
SHELL := /bin/bash
PYTEST := python -m pytest --numprocesses 3 --dist loadscope --no-loadscope-reorder
VENV ?= .venv
PYTHON ?= python3
ARGS ?=

export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: help train test test-fast lint bench gpu docs venv
help:
	@sed -n 's/^# //p; /^$$/q' Makefile

train: venv
	launch/local.sh $(ARGS)

test: lint
	$(PYTEST) --durations=25 $(ARGS)

test-fast: lint
	$(PYTEST) -m 'not processes' $(ARGS)

lint: venv
	ruff check
	ruff format --check
	mypy

bench: venv
	python -m benchmarks $(or $(ARGS),readme)

gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

docs: venv
	NO_MKDOCS_2_WARNING=1 mkdocs serve $(ARGS)

venv:
	@launch/venv.sh "$(VENV)"

# make lint, make test: what every change must pass.   make demo: everything from data to report, in minutes on a CPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
# On a CPU, the pinned XLA is faster here without YNNPACK.
XLA_CPU := --xla_cpu_experimental_ynn_fusion_type=

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow lint clean

help:
	@echo "make venv       install everything that the demo and the tests need in $(VENV)"
	@echo "make demo       make data, train, generate and report in runs/demo"
	@echo "make test       run the tests but the slow ones; show the 20 slowest"
	@echo "make test-slow  run the slow tests and show what they measure"
	@echo "make lint       check the style"
	@echo "make clean      remove build outputs; keep $(VENV) and runs"

venv: $(STAMP)

# torch first, at its exact version: the resolver might otherwise take a build with CUDA, which is several GB.
$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

demo: $(STAMP)
	XLA_FLAGS="$(XLA_CPU) $$XLA_FLAGS" $(BIN)/psa-jax demo --workdir=runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" --numprocesses=auto --maxprocesses=4 --dist=loadfile --durations=20

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow -s

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# make test: what every change must pass.   make demo: the whole line in minutes, on a CPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
# On a CPU, the pinned XLA is faster here without YNNPACK.
XLA_CPU := --xla_cpu_experimental_ynn_fusion_type=

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow lint clean

help:
	@echo "make venv       $(VENV) with everything that the demo and the tests need"
	@echo "make demo       data, training, pictures and report in runs/demo"
	@echo "make test       the tests, without the slow ones"
	@echo "make test-slow  the slow tests, with what they measure"
	@echo "make lint       style"
	@echo "make clean      remove what was built; $(VENV) and runs stay"

venv: $(STAMP)

# torch first and by its exact version: left to the resolver, a build with CUDA of several GB may be taken.
$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

demo: $(STAMP)
	XLA_FLAGS="$(XLA_CPU) $$XLA_FLAGS" $(BIN)/psa-jax demo --workdir=runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" --numprocesses=auto --maxprocesses=4 --dist=loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow -s

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

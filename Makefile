# make lint, make test: what every change must pass.   make demo: everything from data to report, in minutes on a CPU.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# JAX has needed Python 3.12 since 0.11, so 3.11 has versions of its own.
CONSTRAINTS := $(if $(filter 3.11,$(VERSION)),constraints.txt,constraints-py312.txt)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp-$(VERSION)
# One process more than there are cores, since tests wait for processes of their own; each takes 5 GB.
WORKERS := $(shell $(PYTHON) -c 'import os; print(min(4, 1 + (os.cpu_count() or 1)))')
# On a CPU, the XLA of jax 0.10 is faster here without YNNPACK; that of 0.12 leaves it out by itself.
XLA_CPU := --xla_cpu_experimental_ynn_fusion_type=
# A step's buffers are mapped anew in every step; in huge pages that takes half of the time. Other C libraries ignore it.
HUGE_PAGES := glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow lint clean

help:
	@echo "make venv       install everything that the demo and the tests need in $(VENV)"
	@echo "make demo       make data, train, generate and report in runs/demo"
	@echo "make test       run the tests but the slow ones; show the 20 slowest"
	@echo "make test-slow  run the slow tests and show what they measure"
	@echo "make lint       check the style"
	@echo "make clean      remove build outputs; keep $(VENV) and runs"
	@echo "PYTHON=python3.13 after any of them: with that Python, in place of python3"

venv: $(STAMP)

# torch first, at its exact version: the resolver might otherwise take a build with CUDA, which is several GB.
# What another Python installed is of no use to this one.
$(STAMP): setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv $$(test -d $(VENV)/lib/python$(VERSION) || echo --clear) $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) "$$(grep '^torch==' $(CONSTRAINTS))"
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test,dev]'
	touch $@

demo: $(STAMP)
	XLA_FLAGS="$(XLA_CPU) $$XLA_FLAGS" GLIBC_TUNABLES="$${GLIBC_TUNABLES:-$(HUGE_PAGES)}" $(BIN)/psa-jax demo --workdir=runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder --durations=20

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow -s

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

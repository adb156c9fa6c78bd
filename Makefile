# `make train` and `make test` are all that a fresh machine needs: Python 3.11, make and a C library.
PYTHON ?= python3
BIN := .venv/bin
# For clusters with GPUs: its NCCL mends what that of the pinned one breaks (docs/gpu.md).
GPU_TORCH := 2.14.1
# Some machines forbid Python to keep compiled modules. Without them each process that collects tests takes 23 s of CPU
# instead of 13, and every process that is started compiles this package again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: train demo test test-fast test-slow test-all test-long lint wheel clean

# Compiled on all CPUs at the end: pip would do that on one, for as long as all the rest takes. Some packages have files
# that are no Python.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null || true
	touch $@

train: .venv/ready
	$(BIN)/python -m jobs.codegpt

demo: .venv/ready
	$(BIN)/python -m jobs.demo

test: .venv/ready
	$(BIN)/python -m pytest tests -n 2 -m "not long"

test-fast: .venv/ready
	$(BIN)/python -m pytest tests -n 2 -m "not processes and not ray and not long"

# What of `test-long` does not draw seeds of its own, and so is the same in every run, and takes a minute at most.
test-slow: .venv/ready
	$(BIN)/python -m pytest tests -n 2 -m "long and not random and not minutes"

# `test` and `test-slow` in one go: tests are collected once, and what they share is started once.
test-all: .venv/ready
	$(BIN)/python -m pytest tests -n 2 -m "not long or not (random or minutes)"

test-long: .venv/ready
	$(BIN)/python -m pytest tests -n 2 -m "long or random" --hypothesis-profile=fresh

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy elastic
	$(BIN)/lint-imports

wheel: .venv/ready
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .
	cp constraints.txt dist
	sed 's/^torch==.*/torch==$(GPU_TORCH)/' constraints.txt > dist/constraints-gpu.txt

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

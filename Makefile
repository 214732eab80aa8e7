# Two commands on a fresh clone do all: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Two processes, a file to one of them, in the order of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test quick lint types vectors bench drawings clean

demo: $(STAMP)
	$(BIN)/irq-convert demo

test: lint types
	$(PYTEST)

quick: lint
	$(PYTEST) -m "not slow" --hypothesis-profile quick

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

vectors: $(STAMP)
	$(BIN)/python tests/formats/make_vectors.py

bench: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python tests/bench/speed.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

drawings: $(STAMP)
	$(BIN)/python docs/drawings/make.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find irq_convert -name __pycache__ -prune -exec rm -rf {} +

# Each target sets up all it needs in .venv: Python 3.10 or newer and git are enough.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.complete

.PHONY: demo test style bench mutants clean

demo: $(SETUP)  ## train a new concept on the small built-in model, draw it: demo/output/before_after.png
	$(BIN)/python demo/demo.py

test: $(SETUP)  ## the test suite, in two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

style: $(SETUP)  ## ruff's opinion
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: $(SETUP)  ## speed and memory against another script: make bench PEER=path/to/train_custom_diffusion.py
	$(BIN)/python benchmarks/bench.py --peer "$(PEER)" $(BENCH_ARGS)

mutants: $(SETUP)  ## does a test notice when a line is wrong? Takes hours; MUTANTS_ARGS="objective --sample 50" does not
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'mutmut>=3.8,<4'
	$(BIN)/python tests/mutants.py $(MUTANTS_ARGS)

clean:
	rm -rf .venv demo/output benchmarks/work

$(SETUP): requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(SETUP)

# Each target sets up all it needs in .venv and its like: Python 3.10 or newer and git are enough.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.complete
OLDEST := .venv-oldest/bin
# What must work on every version that requirements.txt admits.
CORE := $(wildcard $(addprefix tests/test_,weights.py run.py checkpoints.py resuming.py export.py objective.py evaluate_metrics.py retrieve*.py hub.py versions.py single_file.py))
# Beside torch, transformers, accelerate and tensorboard, which such machines have.
WHEELS ?= diffusers importlib_metadata httpx bitsandbytes
GPU_PYTHON ?= 3.12
PYTEST := -m pytest -n 2 --dist loadfile

.PHONY: demo test test-oldest matrix resolve style bench gpu gpu-wheels mutants clean

demo: $(SETUP)  ## train a new concept on the small built-in model, draw it: demo/output/before_after.png; DEMO=sdxl on the small SDXL
	$(BIN)/python demo/demo.py $(if $(DEMO),--model demo/model_$(DEMO) --output demo/output/$(DEMO))

test: $(SETUP)  ## the test suite on the newest versions (constraints.txt), in two processes
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(PYTEST_ARGS)

test-oldest: .venv-oldest/.complete  ## its core on the oldest versions (requirements-oldest.txt)
	OMP_NUM_THREADS=1 $(OLDEST)/python $(PYTEST) $(CORE) $(PYTEST_ARGS)

matrix:  ## its core on the oldest, the newest and two in between: the table of docs/versions.md
	$(PYTHON) tests/matrix.py $(CORE)

resolve: $(SETUP)  ## asks the package index which versions go together, for each Python; downloads nothing
	$(BIN)/python -m pytest -m index tests/test_versions.py

style: $(SETUP)  ## ruff's opinion
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: $(SETUP)  ## speed and memory against another script: make bench PEER=path/to/train_custom_diffusion.py
	$(BIN)/python benchmarks/bench.py --peer "$(PEER)" $(BENCH_ARGS)

# On a machine with torch and CUDA, which may have no network: what it lacks comes from the wheels that were brought along.
gpu:  ## all that a GPU can tell, in under ten minutes: make gpu PEER=path/to/train_custom_diffusion.py
	for wheels in benchmarks/work/wheels/*.whl; do test ! -e $$wheels || $(PYTHON) -m pip install --quiet --no-index --no-deps \
		--no-compile --upgrade --target benchmarks/work/site $$wheels || exit; done
	PYTHONPATH=benchmarks/work/site:$(CURDIR) $(PYTHON) benchmarks/gpu.py $(if $(PEER),--peer "$(PEER)") $(GPU_ARGS)

gpu-wheels:  ## fetch those wheels, here, for that machine's Python: make gpu-wheels GPU_PYTHON=3.12 WHEELS="diffusers"
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
		$(addprefix --platform manylinux,_2_28_x86_64 _2_24_x86_64 _2_17_x86_64 2014_x86_64) \
		--constraint constraints.txt --dest benchmarks/work/wheels $(WHEELS)

mutants: $(SETUP)  ## does a test notice when a line is wrong? Takes hours; MUTANTS_ARGS="objective --sample 50" does not
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'mutmut>=3.8,<4'
	$(BIN)/python tests/mutants.py $(MUTANTS_ARGS)

clean:
	rm -rf .venv .venv-oldest .venv-matrix demo/output benchmarks/work

$(SETUP): requirements.txt constraints.txt pyproject.toml
	$(call install,.venv,constraints.txt)

.venv-oldest/.complete: requirements.txt requirements-oldest.txt pyproject.toml
	$(call install,.venv-oldest,requirements-oldest.txt)

# $(1): folder of the virtual environment. $(2): file with the exact versions.
define install
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade pip
	$(1)/bin/python -m pip install --quiet --constraint $(2) --editable '.[test]'
	touch $(1)/.complete
endef

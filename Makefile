# make demo | test | kernels | sanitize | lint | docs | bench | gpu | format | clean. PYTHON chooses
# the interpreter.
PYTHON ?= python3
BIN := .venv/bin
DEMO_ARGS ?=
BENCH_ARGS ?=
GPU_ARGS ?=
WHEELS ?=

SOURCES := CMakeLists.txt setup.py $(shell find csrc -type f)
CPP := $(filter csrc/%,$(SOURCES)) $(wildcard tests/cuda_on_host/*)

.PHONY: setup demo test kernels sanitize lint docs bench gpu format clean
setup: .venv/installed .venv/built

demo: setup
	$(BIN)/python examples/demo/run.py $(DEMO_ARGS)

test: setup
	$(BIN)/python -m pytest

# Compiled for every GPU generation, without a GPU, and held to their budgets.
kernels: setup
	PYTHONPATH=. $(BIN)/python tests/kernel_budget.py

# The C++ core without Python. Its threads do not depend on the instruction set.
sanitize: build/sanitize-address/built build/sanitize-thread/built
	ls build/sanitize-thread/segk_test_scalar build/sanitize-address/segk_test_* | xargs -n 1 -P 4 env

build/sanitize-address/built: SANITIZERS := address,undefined
build/sanitize-thread/built: SANITIZERS := thread
build/sanitize-thread/built: TARGETS := --target segk_test_scalar
build/sanitize-%/built: .venv/installed $(SOURCES)
	$(BIN)/cmake -S . -B $(@D) -DSEGK_SANITIZE=$(SANITIZERS)
	$(BIN)/cmake --build $(@D) --parallel $(TARGETS)
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy segkernels python/segrlhf examples/demo
	$(BIN)/clang-format --dry-run --Werror $(CPP)

# The pages of docs/ and the reference, from the docstrings and --help, into build/docs. Sphinx reads
# everything anew (-E), because a warning of a page that it kept would not come again.
docs: setup .venv/docs
	$(BIN)/python -m doctest docs/method.md
	$(BIN)/python -m sphinx -E -W --keep-going -q -d build/doctrees docs build/docs

.venv/docs: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt "segkernels[docs]"
	touch $@

# Everything, into benchmarks/results/ and the tables of README.md and docs/benchmarks.md; with
# BENCH_ARGS="-k linear" a part of it, on the screen alone. SEGKERNELS_ISA=avx2 is for torch too.
BENCH := $(BIN)/python -m pytest benchmarks --quiet --benchmark-quiet
bench: setup .venv/peers
ifeq ($(strip $(BENCH_ARGS)),)
	$(BENCH) --results benchmarks/results
	$(BIN)/python benchmarks/bench_training.py --results benchmarks/results
	$(BIN)/python benchmarks/documents.py
else
	$(BENCH) $(BENCH_ARGS)
endif

# The peers without what they ask for: verl wants an older transformers, and some would bring
# another torch. What verl's functions import is in the bench extra.
PEERS := trl verl liger-kernel cut-cross-entropy
.venv/peers: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt "segkernels[bench]"
	$(BIN)/pip install --quiet -c constraints.txt --no-deps $(PEERS)
	touch $@

# Needs no environment: builds in place with PYTHON, which has torch and Triton for the GPU. WHEELS
# is a folder of peers that PYTHON lacks.
gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(WHEELS),--wheels $(WHEELS)) $(GPU_ARGS)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# constraints.txt pins what the tests run with; without it pip would pick other versions of torch.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version) \
		if sys.version_info < (3, 10) else 0'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt "setuptools>=77" pybind11 cmake
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e ".[gpu,train,test]"
	touch $@

.venv/built: .venv/installed $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

clean:
	rm -rf .venv build dist *.egg-info python/*.egg-info segkernels/*.so

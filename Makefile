# make demo | test | lint | bench | kernels | format | clean. PYTHON chooses the interpreter of the environment.
PYTHON ?= python3
BIN := .venv/bin
DEMO_ARGS ?=

SOURCES := CMakeLists.txt setup.py $(shell find csrc -type f)
CPP := $(filter csrc/%,$(SOURCES)) $(wildcard tests/cuda_on_host/*)

.PHONY: setup demo test lint bench kernels format clean
setup: .venv/installed .venv/built

demo: setup
	$(BIN)/segrlhf demo $(DEMO_ARGS)

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy segkernels python/segrlhf
	$(BIN)/clang-format --dry-run --Werror $(CPP)

bench: setup
	$(BIN)/pip install --quiet -c constraints.txt pytest-benchmark
	$(BIN)/python -m pytest benchmarks/bench_ops.py --benchmark-columns=median,iqr,rounds

# With the CUDA kernels for every GPU, or not at all: `setup` leaves them out where nvcc is not.
kernels: .venv/installed
	CMAKE_ARGS="$(CMAKE_ARGS) -DSEGK_CUDA=ON" PATH="$(CURDIR)/$(BIN):$$PATH" \
		$(BIN)/python setup.py --quiet build_ext --inplace

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
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e ".[train,test]"
	touch $@

.venv/built: .venv/installed $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

clean:
	rm -rf .venv build dist *.egg-info python/*.egg-info segkernels/*.so

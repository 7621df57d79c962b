# make demo | test | bench | lint | format | wheel | cuda-compile | clean
#
# Everything runs in .venv, made on first use from python3 and the pinned versions in constraints.txt.
#   make demo TORCH="torch==2.12.1"       another torch (a version or build that is already there is kept)
#   make test PYTEST_ARGS="-k gradcheck"  some tests
#   make wheel PYTHONS="python3.12 ..."   the secular solver for these interpreters too
#   make bench BENCH_ARGS="self_distillation --group 128x10"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALLED := $(VENV)/installed
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*.h csrc/*/*.cuh csrc/*/*.cpp csrc/*/*.cu)
CXX_FILES := $(wildcard csrc/*/*.h csrc/*/*.cuh csrc/*/*.cpp csrc/*/*.cu tests/native/*.cpp)

.PHONY: demo test bench lint format wheel cuda-compile clean

$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools ninja pybind11 "$(TORCH)" torchvision
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) "triton==3.9.0"
	$(PIP) --no-build-isolation --editable ".[test,bench,dev]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/sdfast demo

# Two processes of one thread each; tests of threads set their own number.
PYTEST_ARGS ?= -n 2
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# Prints one table of times, and records the run under benchmarks/results/.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# A wheel for every Python 3 on this platform; torch stays outside. Release wheels are made in a manylinux container.
# The secular solver is one interpreter's: it is built for the one of .venv and those of PYTHONS; others use NumPy.
PYTHONS ?=
wheel: $(INSTALLED)
	rm -rf build/lib* build/wheel dist
	SDFAST_PYTHONS="$(PYTHONS)" $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude "libtorch*" --exclude "libc10*" \
		--exclude "libcudart*" --wheel-dir dist build/wheel/*.whl

# Every CUDA file for every architecture, against the installed torch's headers: needs nvcc, no GPU and no CUDA torch.
# The secular solver's header among them: CuPy compiles it at run time.
NVCC ?= nvcc
CUDA_ARCHS ?= 80 90 100
cuda-compile: $(INSTALLED)
	mkdir -p build/cuda
	@for file in csrc/*/*.cu csrc/secular/secular.h; do for arch in $(CUDA_ARCHS); do echo $$file $$arch; done; done | \
		HEADERS=$$($(BIN)/python -c "import torch; print(torch.__path__[0])")/include xargs -P "$$(nproc)" -L 1 sh -c ' \
		echo "$$1 sm_$$2"; exec $(NVCC) -x cu -c $$1 -o build/cuda/$$(basename $$(dirname $$1)).$$2.o \
			-gencode arch=compute_$$2,code=sm_$$2 -O3 -std=c++17 --expt-relaxed-constexpr -DUSE_CUDA \
			-DTORCH_TARGET_VERSION=0x020a000000000000 -I$$HEADERS -Xcompiler -fPIC' nvcc

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks sdfast/*.so

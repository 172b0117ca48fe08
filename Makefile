# ngkernels: every command sets up what it needs; `make help` lists them.
#
#   make test PYTHON=python3.12       the interpreter that .venv is made from
#   make test PY=/env/bin/python      an environment of your own: this package is installed into it, in place, and nothing else
#   make build NGKERNELS_BUILD=none   without the C++ library, as on a machine without a compiler

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv build test test-full triton-old gpu gpu-long demo bench lint format wheel clean distclean FORCE

PYTHON ?= python3
VENV ?= .venv
LIBRARY := ngkernels/_C.abi3.so
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# PyTorch for a GPU is the one of the machine: make gpu PYTHON=python3.12 names another than python3
ifneq ($(filter gpu gpu-long,$(MAKECMDGOALS)),)
  PY ?= $(PYTHON)
endif

ifdef PY
  BUILD := FORCE
  INSTALL := --no-deps -e .
else
  PY := $(VENV)/bin/python
  BUILD := $(VENV)/.build
  INSTALL := -e '.[dev,demo]'
endif
BIN := $(if $(findstring /,$(PY)),$(dir $(PY)))
PIP := $(PY) -m pip --disable-pip-version-check

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(BUILD)  ## make .venv: PyTorch, all that the tests and the demo need, this package in place

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "ngkernels needs Python 3.10 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.dependencies: | $(VENV)/bin/python
	$(PY) -m pip install torch==2.13.0
	$(PIP) install numpy ninja 'setuptools>=77' wheel
	@touch $@

# The stamp vouches for the library only: where there is none, each call looks for a compiler again.
$(VENV)/.build: $(VENV)/.dependencies setup.py pyproject.toml $(SOURCES) \
                $(if $(wildcard $(LIBRARY)),,FORCE) $(if $(filter none,$(NGKERNELS_BUILD)),FORCE)
	$(PIP) install $(if $(wildcard $@),--quiet) --no-build-isolation $(INSTALL)
	@$(PY) -m ngkernels.env --library
	@touch $@

build: $(BUILD)  ## compile csrc/ and install the package in place; only what changed is compiled again
ifeq ($(BUILD),FORCE)
	$(PIP) install --quiet --no-build-isolation $(INSTALL)
	@$(PY) -m ngkernels.env --library
endif

test: build lint  ## lint and the quick tests: every feature once, under 30 minutes on 2 cores
	@$(call with_backends,$(PY) -m pytest -m 'not slow and not big')

test-full: build lint  ## lint and the whole test matrix
	@$(call with_backends,$(PY) -m pytest)

triton-old: build $(VENV)-triton-old/.ready  ## the Triton kernels compile under Triton 3.6 too, in an environment of its own
	NGKERNELS_AOT_PYTHON=$(VENV)-triton-old/bin/python $(PY) -m pytest -q -m 'not slow' tests/test_triton_aot.py

$(VENV)-triton-old/.ready:
	$(PYTHON) -m venv $(VENV)-triton-old
	$(VENV)-triton-old/bin/python -m pip install torch==2.13.0
	$(VENV)-triton-old/bin/python -m pip install --quiet numpy triton==3.6.0
	@touch $@

# The backends that a run must cover: NGKERNELS_TEST_BACKENDS, else reference and cpp. A library that does not compile has failed
# in `make build`; where there is no compiler, the run says that it leaves cpp out. Threads that wait sleep: the tests' work is in small
# pieces, and on a machine that has other things to do, spinning threads made them take four times as long. Files of tests run side by
# side, one on each core, in the order of tests/conftest.py; an environment of your own without pytest-xdist runs them one after the other.
define with_backends
backends=$${NGKERNELS_TEST_BACKENDS:-}; \
if [ -z "$$backends" ]; then \
    backends=reference,cpp; \
    [ -e $(LIBRARY) ] || { backends=reference; echo "NOT TESTED: the cpp backend, because the library was not built"; }; \
fi; \
echo "backends that must run: $$backends"; \
workers=$$($(PY) -c 'from importlib.util import find_spec; print("-n auto --dist loadfile --no-loadscope-reorder" if find_spec("xdist") else "")'); \
NGKERNELS_TEST_BACKENDS=$$backends OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} $(1) $$workers
endef

lint: build  ## check Python with ruff
	$(PY) -m ruff check .

# CUDA kernels for the GPU that is there alone: every further architecture takes minutes more
gpu gpu-long: export TORCH_CUDA_ARCH_LIST := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1)
gpu gpu-long: export BEGAN := $(shell date +%s)

gpu: build  ## on a machine with a GPU and its PyTorch: tests of the GPU kernels, compute-sanitizer, timings, in 10 minutes; logs into out/gpu
	@PY="$(PY)" benchmarks/gpu.sh

gpu-long: build  ## the same with the whole matrix of tests and of timings
	@LONG=1 PY="$(PY)" benchmarks/gpu.sh

demo: build  ## the main job, small: real images, INRs, neural graphs, training with fused kernels, report and plots
	$(BIN)ngk demo

bench: build  ## measure every backend and every baseline, record the results, the quick grid of the study (out/scale), renew the tables of the README
	$(PY) -m benchmarks
	$(PY) -m neural_graphs.cli scale --budget 256MiB --last 256 --refine 0 --out out/scale
	$(PY) -m benchmarks.report

format: build  ## format Python and C++
	$(PY) -m ruff check --fix --select I .
	$(PY) -m ruff format .
	$(if $(SOURCES),$(BIN)clang-format -i $(SOURCES))

wheel: build  ## build a wheel into dist/
	rm -rf build/lib* build/bdist*
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info python/*.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(LIBRARY) ngkernels/_build_info.json $(VENV)/.build
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove .venv as well
	rm -rf $(VENV)

# make demo   install, build, and train a small MoE model on a local Ray, stock DeepSpeed against the swapped backend
# make test   install, build, and run every test that needs no GPU
PYTHON ?= python3
VENV ?= .venv
# The torch to install first; "torch==2.13.0" of your index may be a CUDA build of several GB. A CPU build serves too:
# make demo TORCH="--index-url <index with CPU builds> torch==2.13.0"
TORCH ?= torch==2.13.0
# More extras to install, each after a comma: EXTRAS=,nvshmem builds NVSHMEM's part too, where nvcc is.
EXTRAS ?=
NVSHMEM := $(if $(findstring nvshmem,$(EXTRAS)),$(shell sed -n 's/^nvshmem = \["\(.*\)"\]/\1/p' pyproject.toml))
# Two recipes at once: the cores, which need no torch, compile while the packages come.
MAKEFLAGS += -j2
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*/*) setup.py ray_deepep/version.py

.PHONY: demo test install lint format benchmark clean
.DELETE_ON_ERROR:

demo: install
	$(BIN)/python -m train.demo $(ARGS)

# On two processes: one has the tests that start Ray, most of them one that they share; see tests/conftest.py. ARGS=-n0 is one process.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder $(ARGS)

install: $(VENV)/.packages $(VENV)/.core

$(VENV)/.tools:
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 13); sys.exit(None if ok else "ray_deepep needs Python 3.11 or 3.12, $(PYTHON) is %d.%d; call make with PYTHON=..." % sys.version_info[:2])'
	@command -v $${CXX:-c++} >/dev/null || { echo "ray_deepep needs a C++17 compiler: apt-get install g++"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "no venv module: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install -q --upgrade "pip>=24" "setuptools>=77,<90" wheel "pybind11>=2.13,<4" $(NVSHMEM)
	touch $@

$(VENV)/.packages: $(VENV)/.tools pyproject.toml constraints.txt
	$(BIN)/pip install -q $(TORCH)
	RAY_DEEPEP_CORES=0 $(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[train,test,lint$(EXTRAS)]'
	touch $@

$(VENV)/.core: $(VENV)/.tools $(SOURCES)
	@echo 'building the compiled cores (a minute or two)'
	$(BIN)/python setup.py -q build_ext --inplace > build.log 2>&1 || { tail -40 build.log; exit 1; }
	@grep '^ray_deepep:' build.log || true
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files csrc)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files csrc)

benchmark: install
	$(BIN)/python -m benchmarks.dispatch_combine
	$(BIN)/python -m benchmarks.deepspeed_layer
	$(BIN)/python -m benchmarks.table

clean:
	rm -rf build build.log dist *.egg-info ray_deepep/*.so $(VENV)/.core

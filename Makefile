# Everything here sets up what it needs: a virtual environment per need, from plain pip.
PYTHON ?= python3
VENV := .venv
CORE := .venv-core
BENCH := .venv-bench
PACKAGE := .venv-package
PIP_FLAGS := --quiet --disable-pip-version-check

export GLOO_SOCKET_IFNAME ?= lo
export OMP_NUM_THREADS ?= 1

# Tests run on all processors; JOBS=0 runs them one after another in one process.
JOBS ?= auto
PYTEST := -m pytest -q -n $(JOBS) --dist loadgroup
RECORDS := build/tests

.PHONY: help wheel demo test test-core test-torch test-tools test-list check compat crash drop-in bench \
	faults fuzz clean

help:
	@echo "make demo                train, kill, resume on another number of ranks, compare (3 minutes)"
	@echo "make test                the tests, without torch and with it (13 minutes on 2 busy processors)"
	@echo "make test-tools          the tests of bench, crash, demo, fuzz and compat themselves"
	@echo "make test-list           whether the last runs of both together left out a test"
	@echo "make check               ruff, mypy, import-linter, the check of the language"
	@echo "make wheel               build the wheel, check it, run it in an empty environment"
	@echo "make compat TORCH=2.3.1  both directions against that release of torch (without TORCH: all)"
	@echo "make crash               SIGKILL at 1,000 random moments of saves (30 minutes; N=100: fewer)"
	@echo "make bench               docs/performance.md: beside others and the machine's limits (an hour and more)"
	@echo "make bench QUICK=1       the same with tiny sizes, into build/bench (5 minutes)"
	@echo "make fuzz CASES=100000   broken and hostile bytes for everything that reads (2 minutes)"
	@echo "make faults              docs/reliability.md: errors of single system calls (needs strace; 8 minutes)"
	@echo "make drop-in             docs/drop-in.md: shardkeep.dcp beside torch's package, name by name"

# One environment for development; the constraints file says which torch.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(PIP_FLAGS) -c constraints.txt -e '.[torch,test,check,demo]'
	@touch $@

# One without torch, to hold the core to its promise.
$(CORE)/ready: pyproject.toml
	$(PYTHON) -m venv $(CORE)
	$(CORE)/bin/pip install $(PIP_FLAGS) -e '.[test]'
	@touch $@

# One for the bench, with the other engines. One that can't be installed is named on the page, with
# the last line of its log.
OTHERS := torchsnapshot torch_checkpointing

$(BENCH)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install $(PIP_FLAGS) -c constraints.txt -e '.[torch,bench]'
	@for other in $(OTHERS); do \
		$(BENCH)/bin/pip install $(PIP_FLAGS) -c constraints.txt $$other \
			> $(BENCH)/$$other.log 2>&1 || tail -n 1 $(BENCH)/$$other.log; \
	done
	@touch $@

demo: $(VENV)/ready
	$(VENV)/bin/python -m demo

# What passes without torch is not run again with it. The options need an equals sign: pytest would take
# the file for a folder of tests otherwise, and not find the conftest.py that adds the options.
test: test-core $(VENV)/ready
	$(VENV)/bin/python $(PYTEST) -m "not tools" --leave-out=$(RECORDS)/core --record-run=$(RECORDS)/torch

test-core: $(CORE)/ready
	$(CORE)/bin/python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
	$(CORE)/bin/python $(PYTEST) -m "not torch and not tools" --record-run=$(RECORDS)/core

test-torch: $(VENV)/ready
	$(VENV)/bin/python $(PYTEST) -m "not tools"

test-tools: $(VENV)/ready
	$(VENV)/bin/python $(PYTEST) -m tools --record-run=$(RECORDS)/tools

# After test and test-tools: fails if pytest collects a test that neither of them has.
test-list: $(VENV)/ready $(CORE)/ready
	@mkdir -p $(RECORDS)
	@for python in $(VENV) $(CORE); do \
		$$python/bin/python -m pytest -q --collect-only > $(RECORDS)/collected || exit 1; \
		PYTHONPATH=tests $(VENV)/bin/python -m support.selection $(RECORDS)/collected \
			$(RECORDS)/core $(RECORDS)/torch $(RECORDS)/tools || exit 1; \
	done

check: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/python tools/check_language.py

# One to build and check the package with; pyright brings its own Node.
$(PACKAGE)/ready: pyproject.toml
	$(PYTHON) -m venv $(PACKAGE)
	$(PACKAGE)/bin/pip install $(PIP_FLAGS) build twine 'pyright[nodejs]'
	@touch $@

wheel: $(PACKAGE)/ready
	mkdir -p build && rm -rf build/dist build/wheel-env
	$(PACKAGE)/bin/python -m build --outdir build/dist . > build/wheel.log 2>&1 || { tail -n 20 build/wheel.log; exit 1; }
	$(PACKAGE)/bin/twine check --strict build/dist/*
	$(PYTHON) -m venv build/wheel-env
	build/wheel-env/bin/pip install $(PIP_FLAGS) build/dist/*.whl
	cd build && wheel-env/bin/python -m shardkeep --version
	cd build && wheel-env/bin/python -c "import shardkeep; from shardkeep import *; print('py.typed:', __import__('importlib.resources').resources.files('shardkeep').joinpath('py.typed').is_file())"

compat: $(VENV)/ready
	$(VENV)/bin/python -m compat $(or $(TORCH),--all)

drop-in: $(VENV)/ready
	$(VENV)/bin/python -m compat.names_page

crash: $(VENV)/ready
	$(VENV)/bin/python -m crash --moments $(or $(N),1000)

faults: $(VENV)/ready
	PYTHONPATH=tests $(VENV)/bin/python -m support.injected docs/reliability.md

bench: $(BENCH)/ready
	$(BENCH)/bin/python -m bench $(if $(QUICK),--quick)

fuzz: $(VENV)/ready
	PYTHONPATH=. $(VENV)/bin/python -m fuzz --cases $(or $(CASES),100000) --seed $(or $(SEED),1)

clean:
	rm -rf $(VENV) $(CORE) $(BENCH) $(PACKAGE) build demo/out

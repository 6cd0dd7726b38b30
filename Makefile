# Everything here sets up what it needs: a virtual environment per need, from plain pip.
PYTHON ?= python3
VENV := .venv
CORE := .venv-core
BENCH := .venv-bench
PIP_FLAGS := --quiet --disable-pip-version-check

export GLOO_SOCKET_IFNAME ?= lo
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test test-core test-torch check compat crash drop-in bench faults fuzz clean

help:
	@echo "make demo                train, kill, resume on another number of ranks, compare (3 minutes)"
	@echo "make test                all tests, with torch and without (25 minutes)"
	@echo "make check               ruff, mypy, import-linter"
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

test: test-core test-torch

test-core: $(CORE)/ready
	$(CORE)/bin/python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
	$(CORE)/bin/python -m pytest -q -m "not torch"

test-torch: $(VENV)/ready
	$(VENV)/bin/python -m pytest -q

check: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

compat: $(VENV)/ready
	$(VENV)/bin/python -m compat $(or $(TORCH),--all)

drop-in: $(VENV)/ready
	$(VENV)/bin/python -m compat.names

crash: $(VENV)/ready
	$(VENV)/bin/python -m crash --moments $(or $(N),1000)

faults: $(VENV)/ready
	PYTHONPATH=tests $(VENV)/bin/python -m support.injected docs/reliability.md

bench: $(BENCH)/ready
	$(BENCH)/bin/python -m bench $(if $(QUICK),--quick)

fuzz: $(VENV)/ready
	PYTHONPATH=. $(VENV)/bin/python -m fuzz --cases $(or $(CASES),100000) --seed $(or $(SEED),1)

clean:
	rm -rf $(VENV) $(CORE) $(BENCH) build demo/out

# Everything below runs in .venv, which is made with the tested versions (constraints.txt) the first time it is needed and again when one of
# pyproject.toml, setup.py and constraints.txt changes. Another Python: make PYTHON=python3.12 …

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/.installed

.PHONY: help demo test bench bench-gpu clean

help:
	@echo 'make demo       search the bits of a small network (a few minutes on a CPU); the report is runs/demo/report.html'
	@echo 'make test       lint, type check and tests'
	@echo 'make bench      time the kernels and print the table'
	@echo 'make bench-gpu  measure everything on a GPU: benchmarks/results/<device>.json (under ten minutes)'
	@echo 'make clean      remove the environment, caches and build products (runs/ stays)'

demo: $(STAMP)
	$(VENV)/bin/qprune search --data digits --model resnet8 --budget w3a3 --method edmips --out runs/demo --overwrite

test: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy qprune kernels
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadfile

bench: $(STAMP)
	$(VENV)/bin/python -m benchmarks

bench-gpu: $(STAMP)
	$(VENV)/bin/python -m benchmarks.gpu

# The stamp is the last thing written: an interrupted set-up starts again from nothing.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'The tested versions need Python 3.11 or newer ("$(PYTHON)" is not): make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo '"$(PYTHON)" cannot make virtual environments: install its venv module (on Debian and Ubuntu the package python3-venv)' >&2; exit 1; }
	@echo 'Setting up $(VENV) with the versions of constraints.txt (a few minutes the first time)'
	@rm -f $@
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) torch setuptools
	@$(PIP) --no-build-isolation --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find qprune kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

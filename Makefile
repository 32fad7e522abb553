# Every target sets itself up: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo demo-lm test lint clean

$(VENV)/.ready: setup.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[test,bench,lint]"
	touch $@

demo: $(VENV)/.ready
	$(PY) -m bench.demo

demo-lm: $(VENV)/.ready
	$(PY) -m bench.demo_lm

test: $(VENV)/.ready
	$(PY) -m pytest

lint: $(VENV)/.ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy jactus jactus_kernels

clean:
	rm -rf $(VENV) out build *.egg-info

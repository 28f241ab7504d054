# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN := runs/pocket-50
RELEASED := .venv-release
SPACE := .venv-space

.PHONY: demo test check style wheel docs space space-bundle release-check clean

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

space: $(INSTALLED)  ## run the Space on this machine
	$(BIN)/python space/app.py

space-bundle: $(INSTALLED)  ## write the folder that is uploaded as a Space, and start it in an environment of its own
	rm -rf dist $(SPACE)
	$(BIN)/python -m build --wheel --no-isolation --outdir dist
	$(BIN)/python .ci/space_bundle.py dist/*.whl dist/space
	$(PYTHON) -m venv $(SPACE)
	$(SPACE)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(SPACE)/bin/python -m pip install --quiet --constraint constraints.txt --requirement dist/space/requirements.txt "gradio[oauth]"
	$(SPACE)/bin/python -m pip check
	$(SPACE)/bin/python .ci/space_starts.py dist/space

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
	rm -rf $(VENV) $(RELEASED) $(SPACE) runs dist build site

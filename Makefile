# Everything runs in .venv, made here with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e

# One torch thread for each pytest worker: two workers share two cores without fighting for them.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadscope

.DEFAULT_GOAL := help
.PHONY: help demo train-demo test test-all lint bench clean

help:
	@echo 'make demo      install, then sample the bundled model with several samplers into out/'
	@echo 'make train-demo  train a small model of digits from nothing, about two minutes, and read what it draws'
	@echo 'make test      install with the tools, lint, check types and imports, run the tests'
	@echo 'make test-all  the same with the slow tests'
	@echo 'make lint      lint, formatting, types and import arrows alone'
	@echo 'make bench     print the measured figures'
	@echo 'make clean     remove what these commands made (.venv, out/, caches); runs/ stays'

demo: $(VENV)/installed
	$(BIN)/fewstep demo

train-demo: $(VENV)/installed
	$(BIN)/python tools/train_demo.py

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) -m 'slow or not slow'

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/installed-dev
	$(BIN)/python bench/run.py

clean:
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name '__pycache__' -type d -prune -exec rm -rf {} +
	rm -rf src/*.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The tests compare with one file of k-diffusion and the network of denoising-diffusion-pytorch, which need none of
# what these packages ask for beyond the tools.
# The stamps make the installation run again only when what it depends on has changed.
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing Fewstep into $(VENV) (a minute or two the first time)'
	$(PIP_INSTALL) .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing Fewstep and its tools into $(VENV) (a minute or two the first time)'
	$(PIP_INSTALL) '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
		k-diffusion denoising-diffusion-pytorch
	touch $@ $(VENV)/installed

# Everything runs in .venv, which the first target makes: a fresh machine needs Python 3.11+ and git.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
# compiled tests are kept: to compile them takes each worker 12 s
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -q -n $(WORKERS) --dist worksteal

.PHONY: demo test check fmt test-random test-gpu test-slow test-export test-newest package docs profiles clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP) ## a small GPT on this machine, then LLaMA2-7B on 8 H100, proven on a small Llama: runs/
	$(BIN)/autoprec tune examples/char_gpt.py --out runs/char_gpt
	$(BIN)/autoprec tune examples/llama_meta.py:llama2_7b --meta --target h100-sxm --parallel fsdp=8 --proxy examples/llama_small.py --loss-tolerance 0.2% --out runs/llama2_7b

test: $(STAMP) ## the test suite, the same in each run (under 4 minutes on two cores)
	$(PYTEST) --durations 10

check: $(STAMP) ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) --durations 10

fmt: $(STAMP) ## format and apply safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-random: $(STAMP) ## many other random examples, for long; what fails becomes an @example
	$(PYTEST) -m 'hypothesis and not gpu and not slow' --hypothesis-profile search --timeout 3600

# The first Python of these that is there: nothing is installed, for a GPU is often where no registry is.
HERE := $(firstword $(wildcard $(BIN)/python) $(PYTHON))

test-gpu: ## the tests that need a CUDA device, in under 4 minutes; see bench/gpu_day.py for what they import
	$(HERE) -m pytest -q -m gpu -W default tests/test_gpu.py

test-slow: $(STAMP) ## whole runs, of seconds to minutes each, whose parts the test suite has in small
	$(BIN)/pytest -q -m slow

test-export: ## exports against the real torchtitan, Megatron and Transformer Engine readers, in a venv of their own
	$(PYTHON) -m venv $(VENV)-export
	$(VENV)-export/bin/pip install --quiet -c constraints.txt -e '.[consumers]'
	$(VENV)-export/bin/pytest -q tests/test_export.py

test-newest: ## the test suite with the newest torch that pip takes (a build for CUDA, 5 GB), in a venv of its own
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/pip install --quiet --upgrade -e '.[dev]'
	$(VENV)-newest/bin/pytest -q -n $(WORKERS) --dist worksteal

package: $(STAMP) ## an sdist and a wheel in dist/, once the wheel was run in a venv of its own
	$(BIN)/pytest -q -m slow tests/test_package.py
	rm -rf dist
	$(BIN)/python -m build --no-isolation

docs: $(STAMP) ## the pages of docs/ as a site in site/: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

profiles: $(STAMP) ## fit the device profiles again from the published rows in bench/data
	$(BIN)/python bench/fit_costmodel.py

clean:
	rm -rf $(VENV) $(VENV)-export $(VENV)-newest runs dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis

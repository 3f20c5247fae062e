# Two commands: make demo, make test. Both set everything up on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One thread each for two test processes: on a small machine that is quicker than two threads in one. The long tests come
# last, and the process that is done first takes some of the other's.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test docs wheel test-slow fuzz kill-test lint figures ranks bits cards clean

demo: $(INSTALLED)
	$(BIN)/sdlora train datasets/openmoji --preset openmoji
	@echo "next      . $(VENV)/bin/activate, once in a shell; then: sdlora train my-images"

test: lint
	$(PYTEST)

test-slow: $(INSTALLED)
	$(PYTEST) -m slow

# A wheel in dist/, which brings the presets and the built-in base.
wheel: $(INSTALLED)
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

# The site, in build/site; broken links and pages without a place in the menu are errors.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file docs/mkdocs.yml
	@echo "open build/site/index.html"

# Random inputs for the readers of files, new ones at every run: make fuzz SDLORA_FUZZ=100000
fuzz: $(INSTALLED)
	SDLORA_FUZZ=$(or $(SDLORA_FUZZ),10000) $(PYTEST) tests/fuzz -m slow

# Kills a thousand runs at random moments and resumes them; KILLS and SEED set how many and when.
kill-test: $(INSTALLED)
	KILLS=$(or $(KILLS),1000) SEED=$(or $(SEED),2) $(BIN)/python -m pytest -s -m slow -k killed_at_random_on_the_builtin_base tests/training/test_faults.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The figures and tables of the README, measured again: about half an hour on two cores.
figures: $(INSTALLED)
	$(BIN)/jupyter execute --inplace notebooks/is_it_learnt.ipynb notebooks/grow_an_adapter_tree.ipynb

# The sweep over ranks: an hour on two cores. It resumes where it stopped; remove the table to start again.
ranks: $(INSTALLED)
	$(BIN)/python -m sdlora.builtin.measure_runs ranks datasets/openmoji --out notebooks/figures/ranks.json
	$(BIN)/jupyter execute --inplace notebooks/how_much_rank.ipynb

# What a quantized base saves and costs, for the table of the README: twelve runs.
bits: $(INSTALLED)
	$(BIN)/python -m sdlora.builtin.measure_runs bits datasets/openmoji --out notebooks/figures/bits.json

# Memory and time of presets on some cards, for the table of the README: half a minute.
cards: $(INSTALLED)
	$(BIN)/python -m sdlora.builtin.card_table

clean:
	rm -rf build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

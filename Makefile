# make quickstart | test | check | docs | bench. PIP_ARGS goes to pip, for instance to take torch's small CPU build:
#   make quickstart PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# make bench measures what has no row in benchmarks/results/compress.json yet, and draws the tables; about two hours.
#   PARENT   the parent, a Hugging Face folder: the one that the peers in benchmarks/results/peers.json were made from
#   DATA     a folder with wikitext-2.valid.txt, wikitext-2.test.txt and tinyshakespeare.txt
#   SCRATCH  where the work is kept until it is whole (default out/bench; 25 GB)
#   PART     one part instead of all:  make bench PARENT=… DATA=… PART="fit --effort high --size 84MB"
PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= 2
BIN := .venv/bin
SMALL := out/smollm2-84mb
SCRATCH ?= out/bench
PART ?= all

.PHONY: quickstart venv test check docs bench clean

quickstart: .venv/installed
	$(BIN)/gulliver fit catalog:smollm2-135m-instruct --size 84MB --effort fast --data catalog:shakespeare --out $(SMALL)
	@echo "the model is in $(SMALL), its report in $(SMALL)/report.html"

venv: .venv/installed-dev

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e .
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch .venv/installed $@

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

check: .venv/installed-dev
	$(BIN)/ruff check src tests docs benchmarks
	$(BIN)/ruff format --check src tests docs benchmarks
	$(BIN)/pyright
	$(MAKE) test

docs: .venv/installed-dev
	$(BIN)/python docs/make_steps.py

bench: .venv/installed-dev
	@test -n "$(PARENT)" && test -n "$(DATA)" || { echo "usage: make bench PARENT=FOLDER DATA=FOLDER"; exit 2; }
	$(BIN)/python benchmarks/compress.py --parent "$(PARENT)" --data-folder "$(DATA)" --home "$(SCRATCH)" $(PART)

clean:
	rm -rf .venv out build

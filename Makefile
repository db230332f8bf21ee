# Needs make, git and Python 3.11 or newer. Every target does the set-up it needs; README has the way without make.
#   make setup TORCH='torch==2.13.0 --index-url ...'   another torch build: any pip arguments; kept until you give others
#   make setup PYTHON=/some/python3.12                 another Python
#   make figures FIG='cost house'                    only these; `vlab figures list` has the names
#   make lab ARGS=--allow-root                         further arguments for JupyterLab
PYTHON ?=
TORCH  ?=
ARGS   ?=
FIG    ?=
OLDEST := 'transformers==5.17.0' 'huggingface-hub<2'
# what must hold on the oldest transformers we claim
PARITY := tests/test_parity.py tests/test_tower.py tests/test_mod.py tests/test_streaming.py tests/test_released_method.py tests/test_families.py tests/test_generate.py tests/test_hooks.py tests/test_slots.py
BIN    := .venv/bin
# two workers, each with its half of the list: tests of one file share models that are made once
PYTEST := python -m pytest -n 2 --dist worksteal
# Two threads: more gains nothing on models this small. Tests and demo never ask a hub.
ENV    := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: help setup demo figures test test-oldest browser lab lint format clean

help:
	@echo 'make demo         a video, a question, an answer, and where it came from: out/demo/'
	@echo 'make figures      every figure of a paper, and a page with all of them: out/figures/'
	@echo 'make test         the test suite'
	@echo 'make test-oldest  the parity tests on the oldest transformers we support'
	@echo 'make browser      the widgets in a real JupyterLab in chromium (installed with apt if missing)'
	@echo 'make lab          JupyterLab at the first notebook, on this machine only'
	@echo 'make lint         ruff and pyright'
	@echo 'make format       what ruff can fix by itself'
	@echo 'make setup        the environment (.venv), re-used while nothing changed'
	@echo 'make clean        remove environments, caches and out/'

setup:
	@sh .ci/setup .venv '$(PYTHON)' '$(TORCH)'

demo: setup
	@$(ENV) $(BIN)/vlab demo

figures: setup
	@$(ENV) $(BIN)/vlab figures run $(FIG) $(ARGS)

test: setup
	@$(ENV) $(BIN)/$(PYTEST)

test-oldest:
	@sh .ci/setup .venv-oldest '$(PYTHON)' '$(TORCH)' $(OLDEST)
	@$(ENV) .venv-oldest/bin/$(PYTEST) $(PARITY)

browser: setup
	@.ci/browser
	@$(ENV) $(BIN)/python -m pytest tests/browser -m browser

lab: setup
	@$(BIN)/jupyter lab --ip=127.0.0.1 --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/00_first_look.ipynb $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright --pythonpath $(BIN)/python

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf .venv .venv.* .venv-oldest .venv-oldest.* out build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# `make help` lists the targets. Everything lives in .venv; nothing else of the machine is touched.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PEERS ?= .peers
# TORCH=skip keeps the torch, torchaudio and torchvision that PYTHON already has.
TORCH ?= install
DEMO ?= demo_data
RUN := $(or $(RUN),$(shell date +%Y%m%d-%H%M%S))

.PHONY: help install train test test-slow test-faults test-gpu lint peers clean

help:           ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.run $(VENV)/.demo   ## .venv with all that training needs (TORCH=skip keeps your own torch)

train: install  ## make demo speech, train a small separator on it, score it on unheard voices, separate files
	$(BIN)/python -m data.prepare demo --output $(DEMO)
	$(BIN)/python train.py experiment=conv_tasnet_demo exp_manager.version=$(RUN)
	$(BIN)/python predict.py ckpt_path=runs/conv_tasnet_demo/$(RUN) input=$(DEMO)/mixtures output=runs/conv_tasnet_demo/$(RUN)/separated

test: $(VENV)/.run $(VENV)/.demo $(VENV)/.test   ## lint and the default tests
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu and not faults" --durations=15

test-slow: $(VENV)/.run $(VENV)/.demo $(VENV)/.test    ## tests that take minutes
	$(BIN)/python -m pytest -m slow --durations=15

test-faults: $(VENV)/.run $(VENV)/.demo $(VENV)/.test  ## killed processes, several ranks, damaged files
	$(BIN)/python -m pytest -n 2 --dist worksteal -m faults --durations=15

test-gpu: $(VENV)/.run $(VENV)/.demo $(VENV)/.test     ## tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu --durations=15

lint: $(VENV)/.test   ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

peers: $(PEERS)/.done   ## .peers with asteroid, NeMo and segmentation_models_pytorch, to compare with

clean:          ## remove .venv and .peers (runs and data stay)
	rm -rf $(VENV) $(PEERS)

$(BIN)/python:
	$(PYTHON) -m venv $(if $(filter skip,$(TORCH)),--system-site-packages) $(VENV)

$(VENV)/.run: requirements.txt | $(BIN)/python
ifeq ($(TORCH),skip)
	grep -vE '^torch(audio|vision)?==' requirements.txt > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(VENV)/requirements.txt
else
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
endif
	@touch $@

$(VENV)/.demo: requirements-demo.txt | $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-demo.txt
	@touch $@

$(VENV)/.test: requirements-test.txt | $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@

$(PEERS)/.done: requirements-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-peers.txt
	@touch $@

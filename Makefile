# Everything a new machine needs is Python 3.11 or newer, and make.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: install run emoji test test-parity lint clean

install: $(VENV)/core
run: $(VENV)/core          ## train the toy, both stages, and say where its pictures are
	$(BIN)/python train.py

emoji: $(VENV)/core        ## a real data set: fetched with npm, trained on one vendor's drawings, measured on another's
	$(BIN)/python emojis.py

test: $(VENV)/test         ## light: no torch, no accelerator
	$(BIN)/python -m pytest tests --ignore=tests/parity

test-parity: $(VENV)/parity ## against PyTorch, transformers, timm, open_clip and tokenizers
	$(BIN)/python -m pytest tests/parity

lint: $(VENV)/test
	$(BIN)/ruff check .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; name one with make PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/core: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable .
	touch $@

$(VENV)/test: $(VENV)/core
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/parity: $(VENV)/test
	$(PIP) --editable '.[parity]'
	touch $@

clean:
	rm -rf $(VENV) .venv-parity parity.log runs .compiled .pytest_cache .ruff_cache *.egg-info

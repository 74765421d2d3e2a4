# Everything a new machine needs is Python 3.11 or newer, and make. `make run PYTHON=python3.13 VENV=.venv313` takes that Python.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
VERSION = import sys; print("%d.%d" % sys.version_info[:2])
# A worker that crashes ends the tests: pytest-xdist can wait without end for its replacement.
TWO     = -n 2 --dist loadfile --max-worker-restart 0
PIP     = $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: install run emoji tutorial test test-long test-parity test-remote test-browser lint clean same-python

install: $(VENV)/core
run: $(VENV)/core          ## train the toy, both stages, and name its samples.png and report.html
	$(BIN)/python train.py

emoji: $(VENV)/core        ## a real data set: download with npm, train on one vendor's drawings, validate on another's
	$(BIN)/python -m inputs.emoji
	$(BIN)/python train.py emoji

tutorial: $(VENV)/tutorial ## run every cell of tutorial/openvision2.py, and write tutorial/openvision2.ipynb
	$(BIN)/python tutorial/build.py

test: $(VENV)/test         ## light: no torch, no accelerator; two files at a time
	QUICK_COMPILE=1 $(BIN)/python -m pytest tests --ignore=tests/parity --ignore=tests/remote --ignore=tests/browser --ignore=tests/long $(LEAVE_OUT) $(TWO) --no-loadscope-reorder

test-long: $(VENV)/test    ## twenty kills, every division over hosts, a long run
	QUICK_COMPILE=1 $(BIN)/python -m pytest tests/long $(TWO)

test-parity: $(VENV)/parity ## against PyTorch, transformers, timm, open_clip, tokenizers and pycocoevalcap
	$(BIN)/python -m pytest tests/parity

test-remote: $(VENV)/test-remote ## against an S3 server, a GCS emulator and an imitation of the Hugging Face hub on this machine
	$(BIN)/python -m pytest tests/remote

test-browser: $(VENV)/browser ## demo.py and report.html in a headless Chromium, which it says how to install if there is none
	$(BIN)/python -m pytest tests/browser

lint: $(VENV)/test
	$(BIN)/ruff check .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; name one with make PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

# An environment keeps the Python that it was made with. A different PYTHON= on the command line is refused, not ignored.
same-python: $(VENV)/bin/python
ifneq ($(origin PYTHON),file)
	@asked=$$($(PYTHON) -c '$(VERSION)') && has=$$($(BIN)/python -c '$(VERSION)') && if [ "$$asked" != "$$has" ]; then \
		echo "$(VENV) was made with Python $$has, not $$asked: name another folder, as in VENV=.venv$$asked, or run make clean"; exit 1; fi
endif

$(VENV)/core: pyproject.toml constraints.txt | same-python
	$(PIP) --editable .
	touch $@

# The extra that has the name of the file.
$(VENV)/test $(VENV)/tutorial: $(VENV)/core
$(VENV)/parity $(VENV)/test-remote $(VENV)/browser: $(VENV)/test
$(addprefix $(VENV)/,test tutorial parity test-remote browser):
	$(PIP) --editable '.[$(@F)]'
	touch $@

clean:
	rm -rf $(VENV) .venv-parity .venv-newer beside.log runs .compiled .pytest_cache .ruff_cache *.egg-info

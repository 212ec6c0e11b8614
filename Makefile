# make run · make test · make check · make docs · make bench · make chaos · make hold · make fuzz · make clean   needs Python >= 3.11 with venv and pip
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help run test check docs bench chaos hold fuzz clean

help:
	@echo "make run    set up and start everything on this machine; prints the URL"
	@echo "make test   set up and run every test"
	@echo "make check  format, lint, types, import rules"
	@echo "make docs   docs/api.md, from the API's own description"
	@echo "make bench  pictures/s beside diffusers' DiTPipeline, overhead, serving beside stock rq workers, and training (about an hour)"
	@echo "make chaos  a thousand jobs under fifty kills, with a report (the tests have the short form; takes some 3 minutes)"
	@echo "make hold   full load, a crowd of event streams, Redis gone for 30 s twice, a soak of 20 minutes (about 35 minutes)"
	@echo "make fuzz   ten thousand requests by Schemathesis, with a report (the tests have the short form; takes some 8 minutes)"
	@echo "make clean  remove what was set up (not .dit, which holds queued jobs)"

# A stamp per set of packages, so that a second start installs nothing. torch comes first and by itself: pip takes the pinned build.
define install
	@$(PYTHON) -c 'import sys; sys.exit("dit needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || { echo "dit: making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "dit: installing what constraints.txt pins (the first time takes a few minutes)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$(1)]"
	@touch $@
endef

$(VENV)/local.stamp: pyproject.toml constraints.txt
	$(call install,local)

$(VENV)/dev.stamp: pyproject.toml constraints.txt
	$(call install,dev)
	@touch $(VENV)/local.stamp

run: $(VENV)/local.stamp
	@exec $(BIN)/dit up

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(VENV)/dev.stamp
	$(BIN)/python -m app.apidoc > docs/api.md

bench: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/train.py

chaos: $(VENV)/dev.stamp
	$(BIN)/python -m tests.chaos.long

hold: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/load.py
	$(BIN)/python benchmarks/streams.py
	$(BIN)/python benchmarks/outage.py
	$(BIN)/python benchmarks/soak.py

fuzz: $(VENV)/dev.stamp
	$(BIN)/python -m tests.e2e.fuzz.long

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis test-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

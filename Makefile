# make serve   environment, install, fetch SmolLM2, serve it at three depths
# make test    environment, install, tests
# make docs    environment, install, the documentation site in site/
# make check   format, lint, types, tests, docs
# make clean   remove the environment and the caches
#
# Everything lives in .venv; what is already there is reused. Settings: PYTHON=python3.12, HOST=, PORT=, and
# ARGS= for further arguments of "sleb serve" or pytest.

PYTHON ?= python3
VENV   ?= .venv
HOST   ?= 127.0.0.1
PORT   ?= 8000
ARGS   ?=

BIN     := $(VENV)/bin
PIP     := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt
# The install compiles the CPU kernels, so that nobody who starts the server waits for it.
SOURCES := pyproject.toml constraints.txt setup.py $(wildcard kernels/cpu/build.py kernels/cpu/src/*.[ch])

.PHONY: help serve test docs check install install-dev clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

serve: install
	@echo "==> fetching SmolLM2 (at once when it is already here) and serving it; stop with Ctrl-C"
	@exec $(BIN)/python -m sleb serve --host $(HOST) --port $(PORT) $(ARGS)

test: install-dev
	@echo "==> running the tests"
	@$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

docs: install-dev
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "==> the site: site/index.html"

check: install-dev
	@PYTHON=$(BIN)/python scripts/check

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: $(VENV)/.created $(SOURCES)
	@echo "==> installing sleb into $(VENV) (the first time takes minutes: torch is large)"
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created $(SOURCES)
	@echo "==> installing sleb and its test tools into $(VENV) (the first time takes minutes: torch is large)"
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --editable ".[dev]"
	@touch $(VENV)/.installed $@

$(VENV)/.created:
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "error: no '$(PYTHON)' here; name a Python 3.11 or newer: make PYTHON=/path/to/python3.12 …" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: $$("$(PYTHON)" -V 2>&1) is too old; name a Python 3.11 or newer: make PYTHON=python3.12 …" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "error: '$(PYTHON)' has no venv module; on Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@echo "==> creating $(VENV) with $$("$(PYTHON)" -V)"
	@"$(PYTHON)" -m venv --clear $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info kernels/cpu/src/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis

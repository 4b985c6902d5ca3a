# `make help` lists the goals. They run in
#   VENV=dir   when it is given; else in
#   PYTHON     when that already has what setup.cfg asks for; else in
#   .venv
# One that has everything is used as it is, and no network is needed. PYTHON is never
# installed into; the other two are made and filled, with the versions in constraints/.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env decode test check sanitize format clean

help:
	@echo "make decode    measure how fast a 70b decodes here, as many layers as fit"
	@echo "make test      run the test suite"
	@echo "make check     format check, lint and types, as CI runs them"
	@echo "make sanitize  the C++ kernels under address, undefined-behaviour and thread sanitizers"
	@echo "make format    rewrite the files as the format check wants them"
	@echo "make env       only what the others do first: find or make the environment"
	@echo "make clean     remove what make made, .venv included"
	@echo
	@echo "ARGS='...' is passed on; PYTHON=python3.12 picks an interpreter; VENV=dir an environment"

ifneq (,$(filter-out help clean,$(MAKECMDGOALS)))

# Prints "ready", or what is missing: setup.cfg's own lists against the installed versions.
LOOK = \
  import configparser, importlib; \
  from importlib import metadata, util; \
  home = "packaging" if util.find_spec("packaging") else "pip._vendor.packaging"; \
  Requirement = importlib.import_module(home + ".requirements").Requirement; \
  cfg = configparser.ConfigParser(); \
  cfg.read("setup.cfg"); \
  extras = [cfg["options.extras_require"][name] for name in "$(EXTRAS)".split()]; \
  needs = map(Requirement, "".join([cfg["options"]["install_requires"], *extras]).split()); \
  needs = [n for n in needs if n.name != "ternax" and (not n.marker or n.marker.evaluate())]; \
  has = lambda n, d: n.specifier.contains(d.version, prereleases=True); \
  missing = [n for n in needs if not any(has(n, d) for d in metadata.distributions(name=n.name))]; \
  print(", ".join(n.name + str(n.specifier) for n in missing) or "ready")

ifneq (,$(filter check format,$(MAKECMDGOALS)))
EXTRAS := notebook test dev
else ifneq (,$(filter test env,$(MAKECMDGOALS)))
EXTRAS := notebook test
endif

LOOK_AT := $(if $(filter file,$(origin VENV)),$(PYTHON),$(VENV)/bin/python)
FOUND := $(shell $(LOOK_AT) -c '$(LOOK)' 2>/dev/null)

ifeq ($(FOUND),ready)
PY := $(LOOK_AT)
else
PY := $(VENV)/bin/python
# An environment that is already here keeps its Python; only .venv is remade for PYTHON=.
REMAKE := $(and $(filter file,$(origin VENV)),$(filter-out file,$(origin PYTHON)))
BASE := $(or $(if $(REMAKE),,$(wildcard $(PY))),$(PYTHON))
VERSION := $(shell $(BASE) -c 'import sys; v = sys.version_info; \
  print("%d.%d" % v[:2] if v >= (3, 11) else "")' 2>/dev/null)
ifeq (,$(VERSION))
$(error $(BASE) is no Python from 3.11 on; name one: make $(MAKECMDGOALS) PYTHON=python3.12)
endif
CONSTRAINTS := $(wildcard constraints/py$(subst .,,$(VERSION)).txt)
READY := $(VENV)/.ready-$(VERSION)
endif

endif

CUDA = $(shell nvidia-smi -L >/dev/null 2>&1 && echo ,cuda)

env: $(READY)
	@$(PY) -c 'import sys; print("python: %s (%d.%d.%d)" % (sys.executable, *sys.version_info[:3]))'

decode: $(READY)
	$(PY) -m experiments.decode --config=70b --fit=auto $(ARGS)

test: $(READY)
	$(PY) -m pytest -q -n auto --dist loadfile $(ARGS)

check: $(READY) | build/types/ternax
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

sanitize: $(READY)
	$(PY) tests/kernels/cpu/sanitize.py

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf .venv build dist ternax.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# mypy knows no package_dir; here it finds the names that the code imports.
build/types/ternax:
	mkdir -p $@
	ln -sfn ../../../kernels ../../../configs ../../../experiments $@

$(VENV)/bin/python$(VERSION):
	$(PYTHON) -m venv $(if $(filter file,$(origin VENV)),--clear) $(VENV)

$(VENV)/.ready-$(VERSION): setup.cfg pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python$(VERSION)
	@echo "$(LOOK_AT) lacks $(or $(FOUND),what setup.cfg lists);"
	@echo "installing into $(VENV), once; this takes minutes and a package index"
	$(PY) -m pip install -qq --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e '.[dev$(CUDA)]'
	@touch $@

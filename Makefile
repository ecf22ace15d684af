# Everything a fresh Debian machine needs is installed by these targets. Caches lie outside the tree, keyed by content.
CACHE  := $(or $(QLORA_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/qlora-operator)
VENV   := $(CACHE)/venv-$(shell sha256sum requirements/dev.lock | cut -c1-12)
PYTHON := $(VENV)/bin/python
SYSTEM_PYTHON ?= python3
export OMP_NUM_THREADS ?= 1
export PYTHONPATH := $(CURDIR):$(CURDIR)/crds:$(CURDIR)/operator:$(CURDIR)/trainer

.DEFAULT_GOAL := help
.PHONY: help demo test off-cluster on-cluster check unit cluster e2e soak bench bench-trainer oracle up down generate lock format venv

help: ## Show this list
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

demo: $(VENV)/.ready ## Run the quickstart end to end (CLUSTER=current REGISTRY=... TAG=... for a cluster of yours)
	$(PYTHON) -m examples.quickstart.demo --cluster $(or $(CLUSTER),embedded) \
	    $(if $(REGISTRY),--registry $(REGISTRY)) $(if $(TAG),--tag $(TAG))

# What needs the one cluster runs beside what does not, which takes the time that the former waits.
test: $(VENV)/.ready ## Formatting, lint, types, unit, cluster and end-to-end tests
	$(MAKE) --jobs=2 --no-print-directory off-cluster on-cluster

off-cluster:
	nice $(MAKE) check unit

on-cluster: $(VENV)/.ready
	$(PYTHON) -m pytest -m "(cluster or e2e) and not soak" --durations=15

check: $(VENV)/.ready ## Formatting, lint, types, import rules, generated files
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m ruff check
	$(VENV)/bin/lint-imports --no-cache
	$(PYTHON) -m basedpyright --pythonpath $(PYTHON)
	$(PYTHON) -m qlora_api.schema --check
	$(PYTHON) -m qlora_api.reference --check
	$(PYTHON) -m charts.monitoring.dashboard --check
	$(PYTHON) -m charts.monitoring.page --check

unit: $(VENV)/.ready ## Tests without a cluster
	$(PYTHON) -m pytest -m "not cluster and not e2e and not soak"

cluster: $(VENV)/.ready ## Tests of the parts against the real cluster
	$(PYTHON) -m pytest -m "cluster and not soak"

e2e: $(VENV)/.ready ## Tests of the installed product on the real cluster
	$(PYTHON) -m pytest -m "not soak" tests/e2e

soak: $(VENV)/.ready ## What takes too long for `make test`
	$(PYTHON) -m pytest -m soak

bench: $(VENV)/.ready ## Measure the operator (on the embedded cluster, and its planning alone) and write docs/benchmarks
	$(PYTHON) -m tests.bench all

bench-trainer: $(VENV)/.ready ## Measure the trainer on the CPU beside TRL and transformers and write docs/measurements/trainer.md
	$(PYTHON) -m tests.bench.trainer

oracle: $(VENV)/.ready ## Compare the memory plan with real model code on fake tensors and write docs/measurements/oracle.md
	$(PYTHON) -m tests.oracle

up: $(VENV)/.ready ## Bring the embedded cluster up
	$(PYTHON) -m tests.cluster up

down: $(VENV)/.ready ## Stop the embedded cluster and remove what it left
	$(PYTHON) -m tests.cluster down

generate: $(VENV)/.ready ## Write from their sources: CRD, reference, dashboard, tables of metrics, chart values, sizing errors, findings and docs/cli.md
	$(PYTHON) -m qlora_api.schema
	$(PYTHON) -m qlora_api.reference
	$(PYTHON) -m charts.monitoring.dashboard
	$(PYTHON) -m charts.monitoring.page
	$(PYTHON) -m tests.unit.test_chart
	$(PYTHON) -m tests.unit.test_data_page
	$(PYTHON) -m tests.e2e.troubleshooting
	$(PYTHON) -m tests.unit.operator.test_sizing
	$(PYTHON) -m tests.unit.operator.test_known_sizes
	$(PYTHON) -m tests.unit.operator.test_cli_page

format: $(VENV)/.ready ## Format the code
	$(PYTHON) -m ruff format
	$(PYTHON) -m ruff check --fix

# The development lock comes first and constrains the others: what is tested is what ships.
COMPILE = $(PYTHON) -m uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --no-annotate \
          --python-version 3.11 --universal
lock: $(VENV)/.ready ## Lock the dependencies anew
	$(COMPILE) pyproject.toml --extra operator --extra trainer --extra plot --group dev --output-file requirements/dev.lock
	$(COMPILE) pyproject.toml --constraint requirements/dev.lock --output-file requirements/base.lock
	$(COMPILE) pyproject.toml --constraint requirements/dev.lock --extra operator --output-file requirements/operator.lock
	$(COMPILE) pyproject.toml --constraint requirements/dev.lock --extra trainer --output-file requirements/trainer.lock
	$(COMPILE) tests/cluster/olah/requirements.in --output-file tests/cluster/olah/requirements.lock

venv: $(VENV)/.ready

# One environment per lock file; those of other locks are removed.
$(VENV)/.ready:
	@command -v $(SYSTEM_PYTHON) >/dev/null || { echo "python3 is missing: apt-get install python3 python3-venv"; exit 1; }
	@$(SYSTEM_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "Python 3.11 or newer is needed: set SYSTEM_PYTHON"; exit 1; }
	@$(SYSTEM_PYTHON) -c 'import ensurepip' || { echo "venv is missing: apt-get install python3-venv"; exit 1; }
	@echo " - Python environment: installing (6 GiB, once per lock file) ..."
	rm -rf $(CACHE)/venv-*
	$(SYSTEM_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check uv
	$(PYTHON) -m uv pip install --python $(PYTHON) --require-hashes -r requirements/dev.lock
	touch $@

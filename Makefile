# meshd: `make run` and `make test` do all the set-up they need; `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell scripts/find-python.sh)
ARGS ?=
PYTEST ?= $(BIN)/python -m pytest

.PHONY: help run test check unit bench service-test arm64-test soak venv engine wheel system lock format clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: engine ## set everything up and start a node with the built-in model (ARGS="…" adds flags)
	exec $(BIN)/meshd run --model builtin $(ARGS)

test: system venv engine ## set everything up and run all checks and tests, as CI does
	$(MAKE) --no-print-directory lint
	$(PYTEST) $(ARGS)

check: venv ## the quick gate: lint, types, import rules, unit tests (two minutes on two cores)
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint unit

.PHONY: lint
lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

unit: venv ## unit tests alone
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-quick} $(PYTEST) -m "not engine and not slow" -q $(ARGS)

bench: system venv engine ## the benchmarks; prints tables, writes bench/results
	$(BIN)/python -m bench.start
	$(BIN)/python -m bench.proxy
	$(BIN)/python -m bench.mesh
	$(BIN)/python -m bench.failover
	$(BIN)/python -m bench.split
	$(BIN)/python -m bench.push_or_fetch
	$(BIN)/python -m bench.cache

service-test: venv engine ## the tests under a real systemd (root; Debian in a container; minutes)
	scripts/system-packages.sh service
	SERVICE_TEST=1 $(PYTEST) tests/service $(ARGS)

arm64-test: venv ## the image's steps and a node on an emulated aarch64 (root; Debian; half an hour)
	ARM64_TEST=1 $(PYTEST) tests/arm64 -s $(ARGS)

soak: venv engine ## the long runs
	SOAK_TEST=1 HYPOTHESIS_PROFILE=soak $(PYTEST) -m "engine or slow" $(ARGS)

venv: $(VENV)/.stamp ## .venv with meshd (editable) and everything the tests need

$(VENV)/.stamp: pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "meshd needs Python 3.11 or newer with venv; Debian and Ubuntu: apt install python3 python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

engine: venv ## a proved CPU engine, built once and then found again
	$(BIN)/meshd runtime build --backend cpu --if-missing

wheel: ## dist/meshd-VERSION-py3-none-any.whl
	@test -x $(BIN)/python || $(MAKE) --no-print-directory venv
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

system: ## what the tests need from the system: installed when root, named otherwise
	scripts/system-packages.sh

lock: ## renew requirements.lock (needs uv)
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --custom-compile-command "make lock" --extra test pyproject.toml -o requirements.lock

format: venv ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what the targets made here (not the engine cache)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache bench/native/bin

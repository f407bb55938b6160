# `make` or `make help` lists the targets. Everything lands in .venv; nothing else is changed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

LOCK := deploy/requirements.txt
BIN := .venv/bin
ARGS ?=

# Where it is set, each of the many processes that start would compile torch's Python files anew.
unexport PYTHONDONTWRITEBYTECODE

# The first interpreter that is new enough; `make setup PYTHON=/path/to/python` chooses another.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null \
	&& { echo "$$python"; break; }; done)

.PHONY: help setup demo test lint format bench lock clean

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do \
		printf '  make %-8s %s\n' "$$name" "$$text"; done

setup: .venv/.installed .venv/.jars ## Make .venv with pinned packages and fetch Kafka's jars

demo: setup ## Run the whole loop on real Kafka and real bars; the report is demo/report.html
	@$(BIN)/gpt-trader-stream demo $(ARGS)

test: setup ## Run all tests, those on real Kafka and PostgreSQL too (ARGS="-k name" for some)
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/.installed ## Check format, lint rules and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: .venv/.installed ## Format the code and apply the safe lint fixes
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup ## Measure predictions per second on real Kafka (ARGS chooses another benchmark)
	@$(BIN)/gpt-trader-stream bench $(or $(ARGS),inference)

lock: .venv/.installed ## Pin the newest allowed packages anew (ARGS="--upgrade-package NAME" for one)
	@$(BIN)/uv pip compile pyproject.toml --all-extras --group dev --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-annotate --custom-compile-command "make lock" \
		--quiet $(or $(ARGS),--upgrade) --output-file $(LOCK)

clean: ## Remove caches and output (not .venv)
	rm -rf demo dist runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find models schemas workers tests deploy -name __pycache__ -prune -exec rm -rf {} +

.venv/.uv:
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed: make setup PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep -o '^uv==[^ ]*' $(LOCK))"
	@touch $@

.venv/.installed: .venv/.uv $(LOCK) pyproject.toml
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes $(LOCK)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.jars: .venv/.installed workers/local_kafka.py
	$(BIN)/python -c 'from workers.local_kafka import fetch_jars; fetch_jars()'
	@touch $@

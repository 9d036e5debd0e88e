# Every target makes what it needs first. Tests and lint have a virtual environment in .venv,
# made anew when PYTHON names another version, filled anew when a requirements file changes.

PYTHON ?= python3
ARGS ?=
FUZZ_EXAMPLES ?= 300
FUZZ_SECONDS ?= 60

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --retries 1 --timeout 20

# Stamps: VENV_STAMP says which Python the environment is of; TESTS_STAMP holds the Python that
# runs the tests: the environment's, or PYTHON itself where no package index is in reach.
VENV_STAMP := $(VENV)/stamp-python-$(PYTHON_VERSION)
TESTS_STAMP := $(VENV)/stamp-tests
LINT_STAMP := $(VENV)/stamp-lint
# The npm packages that check dashboard.html, beside a copy of their settings, which they are found from.
PAGE_LINT := $(VENV)/lint-page
PAGE_LINT_STAMP := $(PAGE_LINT)/stamp
FUZZ_STAMP := $(VENV)/stamp-fuzz

.PHONY: help demo test test-long acceptance fuzz bench lint lint-page format man dist clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PYTHON=python3.9 picks the Python, ARGS=\"-k name\" goes to pytest."

demo: ## watch two releases go out to stand-in agents (needs Python and openssl only)
	@PYTHON="$(PYTHON)" bash scripts/demo.sh

test: $(TESTS_STAMP) ## run the tests, on SQLite and, where it is installed, on PostgreSQL
	@$(call say_left_out)
	$$(cat $(TESTS_STAMP)) -m pytest $(ARGS)

test-long: $(TESTS_STAMP) ## the same with many more generated cases (TEST_LONG=1)
	@$(call say_left_out)
	TEST_LONG=1 $$(cat $(TESTS_STAMP)) -m pytest $(ARGS)

acceptance: $(TESTS_STAMP) ## a real serve process, stand-in agents, SQL and curl; DATABASE_URL=postgresql://... for PostgreSQL
	@PYTHON="$$(cat $(TESTS_STAMP))" bash scripts/test_release_executor.sh

bench: $(TESTS_STAMP) ## how fast it is, beside bare scripts; ARGS="makespan --runs 3" for a part
	@$$(cat $(TESTS_STAMP)) scripts/bench.py $(ARGS)

fuzz: $(FUZZ_STAMP) ## generated requests against a running API: from /openapi.json, and of mutated bytes; a TLS scanner
	$(VENV_PYTHON) scripts/fuzz_http.py --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)
	$(VENV_PYTHON) scripts/fuzz_api.py --examples $(FUZZ_EXAMPLES) $(FUZZ_ARGS)
	$(VENV_PYTHON) -m pytest -q tests/test_api_hostile.py -k scanner

lint: $(LINT_STAMP) ## ruff and mypy
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m mypy releasectl.py

lint-page: $(PAGE_LINT_STAMP) ## html-validate, ESLint and stylelint on dashboard.html (needs npm)
	$(PAGE_LINT)/node_modules/.bin/html-validate --config $(PAGE_LINT)/.htmlvalidate.json dashboard.html
	$(PAGE_LINT)/node_modules/.bin/eslint --config $(PAGE_LINT)/eslint.config.mjs dashboard.html
	$(PAGE_LINT)/node_modules/.bin/stylelint --config $(PAGE_LINT)/stylelint.config.mjs dashboard.html

format: $(LINT_STAMP) ## mend what ruff can mend, sort the imports
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff check --select I --fix .

man: ## docs/releasectl.1 out of the tables of releasectl.py
	$(PYTHON) scripts/man_page.py >docs/releasectl.1.new && mv docs/releasectl.1.new docs/releasectl.1

dist: ## dist/releasectl-VERSION.tar.gz, all that a host without internet needs, and its SHA256SUMS
	@bash scripts/dist.sh

clean: ## remove the environment and all caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV_STAMP):
	@test -n "$(PYTHON_VERSION)" || { echo "$(PYTHON) does not run: name a Python from 3.9 on with PYTHON=..." >&2; exit 2; }
	@rm -rf $(VENV) && mkdir $(VENV)
	@$(PYTHON) -m venv $(VENV) || echo "$(PYTHON) can't make a virtual environment (Debian: apt-get install python3-venv)" >&2
	@touch $@

$(TESTS_STAMP): tests/requirements.txt $(VENV_STAMP)
	@echo "installing tests/requirements.txt into $(VENV)" >&2
	@if $(VENV_PYTHON) $(PIP_INSTALL) -r $<; then \
		echo $(VENV_PYTHON) >$@; \
	elif $(PYTHON) -c 'import pytest' 2>/dev/null; then \
		echo $(PYTHON) >$@; \
	else \
		echo "no package index is in reach, and $(PYTHON) has no pytest: install pytest for it" >&2; \
		exit 1; \
	fi

$(LINT_STAMP): tests/requirements-lint.txt $(VENV_STAMP)
	@echo "installing tests/requirements-lint.txt into $(VENV)" >&2
	@$(VENV_PYTHON) $(PIP_INSTALL) -r $<
	@touch $@

$(PAGE_LINT_STAMP): $(wildcard scripts/lint-page/* scripts/lint-page/.[a-z]*) $(VENV_STAMP)
	@command -v npm >/dev/null || { echo "make lint-page needs npm (Debian: apt-get install npm)" >&2; exit 2; }
	@echo "installing scripts/lint-page/package.json into $(PAGE_LINT)" >&2
	@mkdir -p $(PAGE_LINT) && cp scripts/lint-page/* scripts/lint-page/.[a-z]* $(PAGE_LINT)
	@npm install --prefix $(PAGE_LINT) --no-package-lock --no-audit --no-fund --silent
	@touch $@

$(FUZZ_STAMP): tests/requirements-fuzz.txt $(TESTS_STAMP)
	@echo "installing tests/requirements-fuzz.txt into $(VENV)" >&2
	@$(VENV_PYTHON) $(PIP_INSTALL) -r $<
	@touch $@

# One line for a host without a package index: which Python runs, which packages it lacks.
define say_left_out
	python=$$(cat $(TESTS_STAMP)); \
	if [ "$$python" != "$(VENV_PYTHON)" ]; then \
		echo "no package index was in reach: testing with $$python; left out is what needs: $$( \
			for name in hypothesis prometheus_client psycopg psycopg2 pg8000; do \
				$$python -c "import $$name" 2>/dev/null || printf '%s ' $$name; \
			done)(make clean: try the index again)"; \
	fi
endef

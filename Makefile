# Every target makes what it needs first. Tests and lint have a virtual environment in .venv,
# made anew when PYTHON names another version, filled anew when a requirements file changes.

PYTHON ?= python3
ARGS ?=
FUZZ_EXAMPLES ?= 300
FUZZ_SECONDS ?= 60
# How many tests run beside each other: they wait more than they compute. With ARGS it is one after the other.
WORKERS ?= $(if $(ARGS),0,$(shell n=$$((2 * $$(nproc 2>/dev/null || echo 1))); echo $$((n < 8 ? n : 8))))

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

.PHONY: help demo install uninstall deb test test-all test-long acceptance fuzz bench ha lint lint-page format man \
	screens page-screens dist clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PYTHON=python3.9 picks the Python, ARGS=\"-k name\" goes to pytest."

demo: ## watch two releases go out to stand-in agents (needs Python and openssl only)
	@PYTHON="$(PYTHON)" bash scripts/demo.sh

install: ## program, man page, completions, units, settings and, as root, the user: PREFIX (/usr/local), SYSCONFDIR (/etc), DESTDIR
	@PYTHON="$(PYTHON)" PREFIX="$(PREFIX)" SYSCONFDIR="$(SYSCONFDIR)" DESTDIR="$(DESTDIR)" bash scripts/install.sh install

uninstall: ## removes what install put there; settings, data and the user stay
	@PYTHON="$(PYTHON)" PREFIX="$(PREFIX)" SYSCONFDIR="$(SYSCONFDIR)" DESTDIR="$(DESTDIR)" bash scripts/install.sh uninstall

test: $(TESTS_STAMP) ## the quick tests, on SQLite and, where it is installed, on PostgreSQL: seven minutes
	@$(call run_tests,-m "not slow")

test-all: $(TESTS_STAMP) ## all tests: a browser, processes that are killed, many schedules of faults as well
	@$(call run_tests,)

test-long: $(TESTS_STAMP) ## the same with many more generated cases (TEST_LONG=1): hours
	@TEST_LONG=1; export TEST_LONG; $(call run_tests,)

acceptance: $(TESTS_STAMP) ## a real serve process, stand-in agents, SQL and curl; DATABASE_URL=postgresql://... for PostgreSQL
	@PYTHON="$$(cat $(TESTS_STAMP))" bash scripts/test_release_executor.sh

bench: $(TESTS_STAMP) ## how fast it is, beside bare scripts; ARGS="makespan --runs 3" for a part
	@$$(cat $(TESTS_STAMP)) scripts/bench.py $(ARGS)

ha: $(TESTS_STAMP) ## a PostgreSQL primary that is lost in every way under a release; ARGS="kill --driver pg8000" for a part
	@$$(cat $(TESTS_STAMP)) scripts/ha.py $(ARGS)

fuzz: $(FUZZ_STAMP) ## generated requests against a running API: from /openapi.json, and of mutated bytes; a TLS scanner
	$(VENV_PYTHON) scripts/fuzz_http.py --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)
	$(VENV_PYTHON) scripts/fuzz_api.py --examples $(FUZZ_EXAMPLES) $(FUZZ_ARGS)
	$(VENV_PYTHON) -m pytest -q tests/test_api_hostile.py -k scanner

lint: $(LINT_STAMP) ## ruff, mypy and, where it is installed, shellcheck
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m mypy
	@if command -v shellcheck >/dev/null; then shellcheck --external-sources scripts/*.sh .ci/run; else \
		echo "shellcheck is missing: the shell scripts were not checked (Debian: apt-get install shellcheck)" >&2; fi

lint-page: $(PAGE_LINT_STAMP) ## html-validate, ESLint and stylelint on dashboard.html (needs npm)
	$(PAGE_LINT)/node_modules/.bin/html-validate --config $(PAGE_LINT)/.htmlvalidate.json dashboard.html
	$(PAGE_LINT)/node_modules/.bin/eslint --config $(PAGE_LINT)/eslint.config.mjs dashboard.html
	$(PAGE_LINT)/node_modules/.bin/stylelint --config $(PAGE_LINT)/stylelint.config.mjs dashboard.html

format: $(LINT_STAMP) ## mend what ruff can mend, sort the imports
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff check --select I --fix .

man: ## docs/releasectl.1 out of the tables of releasectl.py
	$(PYTHON) scripts/man_page.py >docs/releasectl.1.new && mv docs/releasectl.1.new docs/releasectl.1

screens: ## docs/list.svg, status.svg and watch.svg: what these commands show in a terminal
	$(PYTHON) scripts/screens.py

page-screens: $(TESTS_STAMP) ## docs/dashboard*.png: the dashboard in Chromium, over a world that is made up
	$$(cat $(TESTS_STAMP)) scripts/page_screens.py

dist: ## dist/releasectl-VERSION.tar.gz, all that a host without internet needs, and its SHA256SUMS
	@bash scripts/dist.sh

deb: ## dist/releasectl_VERSION_all.deb, for Debian and its like
	@bash scripts/deb.sh

clean: ## remove the environment and all caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Without pip in it an environment is of no use, so it gets no stamp, and is made again the next time.
$(VENV_STAMP):
	@test -n "$(PYTHON_VERSION)" || { echo "$(PYTHON) does not run: name a Python from 3.9 on with PYTHON=..." >&2; exit 2; }
	@rm -rf $(VENV) && mkdir $(VENV)
	@if $(PYTHON) -m venv $(VENV) >$(VENV)/log 2>&1; then \
		touch $@; \
	elif $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
		cat $(VENV)/log >&2; \
	fi

# The order of this rule's ways: an environment with the requirements; PYTHON, where it has pytest; one command to give.
$(TESTS_STAMP): tests/requirements.txt $(VENV_STAMP)
	@if [ -e $(VENV_STAMP) ]; then \
		echo "installing tests/requirements.txt into $(VENV)" >&2; \
		if $(VENV_PYTHON) $(PIP_INSTALL) -r $<; then echo $(VENV_PYTHON) >$@; exit 0; fi; \
		why="no package index is in reach"; need=pytest; \
	else \
		why="$(PYTHON) can't make a virtual environment"; need=venv; \
	fi; \
	if $(PYTHON) -c 'import pytest' 2>/dev/null; then \
		echo "$$why: testing with $(PYTHON) and its own pytest" >&2; \
		echo $(PYTHON) >$@; \
	else \
		echo "make test: $$why. On Debian this mends it, then make test goes on:" >&2; \
		echo "    $$([ "$$(id -u)" = 0 ] || echo 'sudo ')apt-get install -y $$( [ $$need = venv ] && echo $(notdir $(PYTHON))-venv || echo python3-pytest python3-pytest-xdist )" >&2; \
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

# Runs pytest with the options of $(1), in several processes where pytest-xdist is there.
define run_tests
	python=$$(cat $(TESTS_STAMP)); lacks=; \
	for name in prometheus_client psycopg psycopg2 pg8000; do \
		"$$python" -c "import $$name" 2>/dev/null || lacks="$$lacks $$name"; \
	done; \
	[ -z "$$lacks" ] || echo "left out is what needs:$$lacks ($$python has none; make clean: look for an index again)"; \
	if "$$python" -c 'import xdist' 2>/dev/null; then \
		set -- -n $(WORKERS) --dist worksteal; \
	else \
		set --; echo "$$python has no pytest-xdist: one test after the other, which takes three times as long"; \
	fi; \
	"$$python" -m pytest "$$@" $(1) $(ARGS)
endef

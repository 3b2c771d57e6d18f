# Daily commands; `make` alone lists them. Needs python3 (3.11 or newer) and nothing else.

PYTHON ?= python3
BIN := .venv/bin
# Further arguments: make test ARGS="tests/unit -x"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup run test test-app test-slow test-pooler test-pooler-too test-unit test-oracle model-check simulate lint type format bench uniqueness stale lookup-race outbox-chaos test-chaos-cache test-history test-bites cache-kills bench-idmap-300m halves migrate-kill test-docker api-fuzz api-matrix api-replays hostile-images photo-torn move-grid feed-paging failover-grid test-patroni lock clean

help: ## list these commands
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | \
		awk -F '\t' '{ printf "  make %-17s %s\n", $$1, $$2 }'

setup: ## make .venv from requirements.lock; does nothing when it is up to date
	@$(PYTHON) scripts/setup.py

run: setup ## start the embedded cluster, migrate, load a demo, serve it on 127.0.0.1:8000
	@$(BIN)/python -m app.run $(ARGS)

# Files go to two workers, each with servers of its own: tests wait more than they compute.
WORKERS ?= 2
# A worker that dies ends the run: with `loadfile`, one in its place leaves pytest-xdist waiting for
# ever. A test that hangs for ten minutes shows its stacks and dies.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --max-worker-restart=0 \
	-o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true

test: ## the library's tests, on real servers; installs what they need when root on Debian
	@$(PYTHON) scripts/setup.py --system
	@$(PYTEST) -m "not slow" \
		--ignore=tests/app --ignore=tests/web $(ARGS)

test-app: ## the application's tests, on real servers and in a browser
	@$(PYTHON) scripts/setup.py --system
	@$(PYTEST) -m "not slow" tests/app tests/web $(ARGS)

test-slow: ## tests of both that take long: they kill, or compare with oracles, over and over
	@$(PYTHON) scripts/setup.py --system
	@$(PYTEST) -m slow $(ARGS)

# What goes through it; tests that cannot say why (`unpooled`), and the run prints it.
POOLED ?= tests/integration/test_session.py tests/integration/test_writes.py \
	tests/integration/test_limits.py tests/integration/test_drivers.py \
	tests/integration/test_units.py tests/fault/test_endpoints.py tests/fault/test_pooler.py
POOLED_TOO ?= tests/integration/test_replica_reads.py tests/integration/test_outbox.py \
	tests/integration/test_lookup.py

test-pooler: ## the tests of sessions and of servers that die, through PgBouncer
	@$(PYTHON) scripts/setup.py --system
	@$(PYTEST) --pooler=pgbouncer $(POOLED) $(ARGS)

test-pooler-too: ## those of replicas, outbox and unique values as well; some minutes
	@$(PYTHON) scripts/setup.py --system
	@$(PYTEST) --pooler=pgbouncer $(POOLED_TOO) $(ARGS)

# A target of its own, since it needs what no package of this project brings: docs/docker.md.
test-docker: setup ## bring the whole stack of docker/ up in containers, break it, tear it down
	@docker info >/dev/null 2>&1 || { echo "make test-docker: no Docker engine answers \
	(docker info fails); start one, see docs/docker.md" >&2; exit 1; }
	@$(BIN)/python -m pytest tests/docker $(ARGS)

failover-grid: ## kill the watcher at every step of a failover; three minutes
	@$(PYTHON) scripts/setup.py --system
	@SHARDKIT_FAILOVER_GRID=1 $(BIN)/python -m pytest tests/fault/test_failover.py $(ARGS)

# Patroni is nobody's dependency; its own consensus store needs no other server.
test-patroni: setup ## Patroni promotes and clients follow; installs Patroni when root on Debian
	@command -v patroni >/dev/null || apt-get -qq install -y patroni python3-pysyncobj
	@$(BIN)/python -m pytest tests/patroni $(ARGS)

test-unit: setup ## the tests that need no server
	@$(BIN)/python -m pytest tests/unit tests/contract $(ARGS)

# Statements to compare, half of them of the supported grammar; each 10,000 in new worlds.
CASES ?= 50000

test-oracle: setup ## compare 50,000 statements with one server; CASES=n for more or fewer
	@SHARDKIT_ORACLE_CASES=$(CASES) $(BIN)/python -m pytest tests/property -s $(ARGS)

model-check: setup ## every interleaving of the cache protocol under faults; about ten minutes
	@$(BIN)/python -m tests.property.modelcheck $(ARGS)

# Seeds of each simulated world.
SEEDS ?= 10000

simulate: setup ## run 10,000 seeds of each simulated world; SEEDS=n for more or fewer
	@$(BIN)/python -m tests.simulation 0 --seeds $(SEEDS) $(ARGS)

# Of the long history test: how long things move and break, and what all chance is drawn from.
SECONDS ?= 1500
SEED ?= 0

test-history: setup ## clients at work while servers move and fail, judged; SECONDS=n SEED=n
	@$(BIN)/python -m tests.history.live.run --seconds $(SECONDS) --seed $(SEED) --goals $(ARGS)

test-bites: setup ## fifteen bugs on real servers, each found by the judge named for it; minutes
	@$(BIN)/python -m tests.history.live.bites $(ARGS)

lint: setup ## style, formatting and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo

type: setup ## mypy --strict over the library, the application, tests and benchmarks
	@$(BIN)/mypy

format: setup ## rewrite the files as lint wants them
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup ## every benchmark, with its baseline in the same run
	@$(BIN)/python -m benchmarks $(ARGS)

uniqueness: setup ## 20 million ids under forks, kills and clock steps, and no id twice
	@$(BIN)/python -m benchmarks uniqueness $(ARGS)

halves: setup ## 310 kills in atomic commits over two servers, and no commit half done
	@$(BIN)/python -m benchmarks halves $(ARGS)

migrate-kill: setup ## kill a migration before each of its statements, and no logical shard is half done
	@SHARDKIT_KILL_STEP=1 SHARDKIT_KILL_SECONDS=7200 $(BIN)/python -m pytest -s tests/fault/test_migrate_kill.py $(ARGS)

move-grid: setup ## break movers and servers at every step of a move; about half an hour
	@$(BIN)/python -m tests.fault.movegrid $(ARGS)

stale: setup ## a million writes, each read at once from replicas, and no read is stale
	@$(BIN)/python -m benchmarks stale $(ARGS)

lookup-race: setup ## 64 clients race for 1,000 names while they are killed, and each is had once
	@$(BIN)/python -m benchmarks lookup $(ARGS)

outbox-chaos: setup ## a million events while relays are killed, and Celery beside it; minutes
	@$(BIN)/python -m benchmarks chaos $(ARGS)

test-chaos-cache: setup ## ten million reads of the cache under faults, and none is old; minutes
	@$(BIN)/python -m benchmarks cachechaos $(ARGS)

cache-kills: setup ## for how long something old is shown after writers are killed; a minute
	@$(BIN)/python -m benchmarks cachekills $(ARGS)

feed-paging: setup ## ten million items of feeds while people post, delete and block; minutes
	@$(BIN)/python -m benchmarks feedpaging $(ARGS)

bench-idmap-300m: setup ## 300 million entries in one Redis, about a gigabyte, and a million reads
	@$(BIN)/python -m benchmarks idmap300m $(ARGS)

# Requests generated from the OpenAPI document.
FUZZ ?= 5000

api-fuzz: setup ## 5,000 generated requests to the API, and no answer of 5xx; FUZZ=n for others
	@SHARDKIT_FUZZ_CASES=$(FUZZ) $(BIN)/python -m pytest -s tests/app/test_schemathesis.py $(ARGS)

api-matrix: setup ## every route by everybody to things in every state
	@SHARDKIT_MATRIX=all $(BIN)/python -m pytest -s tests/app/test_matrix.py $(ARGS)

api-replays: setup ## every route that changes something, three times while servers die; minutes
	@SHARDKIT_REPLAYS=all $(BIN)/python -m pytest -s tests/app/test_replays.py $(ARGS)

hostile-images: setup ## 250 hostile pictures: none crashes, none keeps metadata
	@SHARDKIT_HOSTILE=250 $(BIN)/python -m pytest -s tests/app/test_hostile.py $(ARGS)

photo-torn: setup ## crash photo volumes at 20,000 byte positions and kill 60 writers; a minute
	@SHARDKIT_TORN=all $(BIN)/python -m pytest -s tests/app/test_torn.py $(ARGS)

lock: setup ## write requirements.lock anew from pyproject.toml (puts uv into .venv)
	@$(BIN)/python -m uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install -q uv
	@$(BIN)/python -m uv pip compile pyproject.toml --all-extras --universal \
		--python-version 3.11 --generate-hashes --no-emit-index-url --quiet \
		--custom-compile-command "make lock" --upgrade -o requirements.lock

clean: ## stop the embedded cluster; remove it, the virtual environment and caches
	@if [ -x $(BIN)/shardkit ]; then $(BIN)/shardkit local down --delete-data || true; fi
	@rm -rf .venv .shardkit .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache dist build
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

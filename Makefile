# What this project can do, from a machine with python3 (3.11 or later), git and make. `make` alone lists it.

RACK ?= rack-1
STORAGE ?= s3
JOBS ?= 3
IMAGES ?= rabbitmq object-store prometheus
SUITE ?= trixie
TESTS ?=
PYTHON := .venv/bin/python

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run serve test test-broker test-docker images lint lint-deploy dry-run bench crash ledger mutations schemas clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: .venv/.synced ## Start RabbitMQ, an S3 store and a worker (STORAGE=s3|disk, RACK=rack-1) until Ctrl-C
	@exec $(PYTHON) -m deploy.local.run --storage $(STORAGE) --rack $(RACK)

serve: .venv/.synced ## Start the standalone HTTP service: no broker, models in data/models
	@exec .venv/bin/model-manager serve

test: .venv/.synced ## Run all tests, against a real RabbitMQ and a real S3 store
	@exec $(PYTHON) -m pytest -n $(JOBS) --dist loadfile

# As root, with debootstrap: Debian's bookworm has RabbitMQ 3.10, trixie 4.0, sid the newest. RABBITMQ_SUITE works for all else too.
test-broker: .venv/.synced ## Run the tests that need a broker against the RabbitMQ of a Debian suite (SUITE=trixie|sid|bookworm)
	@$(PYTHON) -m deploy.local.suite $(SUITE)
	@RABBITMQ_SUITE=$(SUITE) exec $(PYTHON) -m pytest -n $(JOBS) --dist loadfile -m broker $(TESTS)

test-docker: .venv/.synced ## Run the tests that need services against containers (names of images: see `images`)
	@LOCAL_SERVICES=docker exec $(PYTHON) -m pytest -n $(JOBS) --dist loadfile -m 'broker or s3 or docker' $(TESTS)

.PHONY: compose-up compose-check
compose-up: ## Start two racks with RabbitMQ, an object store and Prometheus in containers (deploy/README.md)
	@deploy/compose/secrets.sh
	@cd deploy && $$(docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose) up -d

compose-check: .venv/.synced ## Go through all that compose.yaml promises: push, hints, alerts, restarts, a kill, down and up
	@exec $(PYTHON) -m tests.compose

# As root, with debootstrap and a Docker daemon; an image that the environment names gets that name.
images: .venv/.synced ## Make the images of the services from Debian's packages, and data/images with their names
	@mkdir -p data
	@deploy/images/from-debian.sh $(IMAGES) >data/images.new && mv data/images.new data/images
	@echo 'made; their names, for make test-docker and compose: . data/images'

lint: .venv/.synced ## Check style, types and the direction of imports
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy -p worker -p schemas -p deploy
	@.venv/bin/lint-imports

lint-deploy: .venv/.synced ## Check what is in deploy/: promtool, kubeconform, systemd-analyze, hadolint
	@$(PYTHON) -m deploy.checks

dry-run: .venv/.synced ## Show deploy/kubernetes to a real API server, built with Go in some minutes, once
	@$(PYTHON) -m deploy.checks.api_server

bench: .venv/.synced ## Measure against the numbers that are promised
	@exec $(PYTHON) -m tests.benchmarks

# As root, with strace and xfsprogs, all of it runs; what does not is told. `python -m tests.crash --help` has the parts.
crash: .venv/.synced ## Kill the journal, cut its power, fail its disk and damage its files, at every point there is
	@exec $(PYTHON) -m tests.crash

ledger: .venv/.synced ## Cut, freeze and kill all there is between callers and rack: nothing is lost or done twice
	@exec $(PYTHON) -m tests.ledger

mutations: .venv/.synced ## Take away each sync, rename and checksum of the journal: some test must notice
	@exec $(PYTHON) -m tests.crash.mutations

schemas: .venv/.synced ## Write the generated documents anew
	@$(PYTHON) -m schemas.documents
	@$(PYTHON) -m deploy.checks.rules

clean: ## Remove data/local*, the virtual environment and all caches in this folder
	rm -rf data/local data/local-* .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# A stamp, so that a set-up environment costs no time.
.venv/.synced: pyproject.toml uv.lock deploy/local/setup.sh
	@sh deploy/local/setup.sh
	@touch $@

# What an operator does, a line each; ARGS='…' passes options on. `make` alone lists the commands.
.PHONY: help up down status key user usage test lint plan roll bench chaos bundle
.SILENT:
ARGS ?=

help:
	sed -n 's/^\([a-z]*\): *.*## */make \1@/p' Makefile | column -t -s @
up: ## bring the stack up, from whatever this machine has
	scripts/bootstrap.sh && PYTHONPATH=. .venv/bin/python scripts/up.py $(ARGS)
down: ## stop the stack; models and metrics stay
	docker compose --profile '*' down --remove-orphans $(ARGS)
status: ## show each part's health and each replica's load
	scripts/bootstrap.sh && .venv/bin/python scripts/status.py $(ARGS)
key: ## make, list, rotate or revoke API keys, and set their limits
	scripts/bootstrap.sh && PYTHONPATH=. .venv/bin/python scripts/key.py $(ARGS)
user: ## add, list or remove users who sign in with a password
	scripts/bootstrap.sh && PYTHONPATH=. .venv/bin/python scripts/user.py $(ARGS)
usage: ## show tokens and requests by day and key
	scripts/bootstrap.sh && .venv/bin/python scripts/usage.py $(ARGS)
test: ## run all tests that need no GPU
	scripts/bootstrap.sh test && .venv/bin/python -m pytest $(ARGS)
lint: ## run every linter
	scripts/bootstrap.sh lint && .venv/bin/python scripts/lint.py $(ARGS)
plan: ## plan the fleet for this host's GPUs and a model
	scripts/bootstrap.sh && .venv/bin/python scripts/plan.py $(ARGS)
roll: ## restart the replicas one by one without breaking a stream
	scripts/bootstrap.sh && .venv/bin/python scripts/roll.py $(ARGS)
bench: ## compare the gateway with its peers
	scripts/bootstrap.sh bench && PYTHONPATH=scripts .venv/bin/python -m lab.bench $(ARGS)
chaos: ## run the fault table
	scripts/bootstrap.sh bench && PYTHONPATH=scripts .venv/bin/python -m lab.chaos $(ARGS)
bundle: ## pack images, models and this checkout for a host without a network
	scripts/bootstrap.sh && .venv/bin/python scripts/bundle.py $(ARGS)

# What an operator does, a line each; ARGS='…' passes options on. `make` alone lists the commands.
.PHONY: help up down status logs key user host doctor report usage test test-fronts lint plan roll bench chaos bundle ray ray-front triton
.SILENT:
ARGS ?=

help:
	sed -n 's/^\([a-z-]*\): *.*## */make \1@/p' Makefile | column -t -s @
up: ## bring the stack up, from whatever this machine has
	scripts/bootstrap.sh && PYTHONPATH=. .venv/bin/python scripts/up.py $(ARGS)
down: ## stop the stack; models and metrics stay
	docker compose --profile '*' down --remove-orphans $(ARGS)
	[ ! -e secrets/hosts/hosts.json ] || PYTHONPATH=. .venv/bin/python scripts/host.py down
status: ## show each part's health and each replica's load
	scripts/bootstrap.sh && PYTHONPATH=. .venv/bin/python scripts/status.py $(ARGS)
logs: ## follow one request through gateway and replica, by its id: ARGS=REQUEST-ID
	scripts/bootstrap.sh && .venv/bin/python scripts/logs.py $(ARGS)
key: ## make, list, rotate or revoke API keys, and set their limits
	scripts/bootstrap.sh && PYTHONPATH=. .venv/bin/python scripts/key.py $(ARGS)
user: ## add, list or remove users who sign in with a password
	scripts/bootstrap.sh && PYTHONPATH=. .venv/bin/python scripts/user.py $(ARGS)
host: ## add, list, renew or remove other hosts of the fleet
	scripts/bootstrap.sh && PYTHONPATH=. .venv/bin/python scripts/host.py $(ARGS)
doctor: ## look at everything, say what is wrong and what to do
	scripts/bootstrap.sh && PYTHONPATH=. .venv/bin/python scripts/doctor.py $(ARGS)
report: ## pack versions, settings, logs and metrics for a bug report, without secrets
	scripts/bootstrap.sh && PYTHONPATH=. .venv/bin/python scripts/report.py $(ARGS)
usage: ## show tokens and requests by day and key
	scripts/bootstrap.sh && .venv/bin/python scripts/usage.py $(ARGS)
test: ## run all tests that need no GPU
	scripts/bootstrap.sh test && .venv/bin/python -m pytest $(ARGS)
test-fronts: ## run the tests of what others built: clients, agents, other fronts
	scripts/bootstrap.sh test && .venv/bin/python -m pytest tests/fronts $(ARGS)
lint: ## run every linter
	scripts/bootstrap.sh lint && .venv/bin/python scripts/lint.py $(ARGS)
plan: ## plan the fleet for this host's GPUs and a model
	scripts/bootstrap.sh && .venv/bin/python scripts/plan.py $(ARGS)
roll: ## restart the replicas one by one without breaking a stream
	scripts/bootstrap.sh && PYTHONPATH=. .venv/bin/python scripts/roll.py $(ARGS)
bench: ## compare the gateway with its peers
	scripts/bootstrap.sh bench && PYTHONPATH=scripts .venv/bin/python -m lab.bench $(ARGS)
chaos: ## run the fault table
	scripts/bootstrap.sh bench && PYTHONPATH=scripts .venv/bin/python -m lab.chaos $(ARGS)
bundle: ## pack images, models and this checkout for a host without a network
	scripts/bootstrap.sh && .venv/bin/python scripts/bundle.py $(ARGS)
ray: ## build the image of a Ray node (docs/ray.md)
	scripts/bootstrap.sh && .venv/bin/python scripts/ray_image.py $(ARGS)
ray-front: ## put the gateway in front of Ray Serve (docs/ray.md)
	scripts/bootstrap.sh && PYTHONPATH=. .venv/bin/python scripts/ray_front.py $(ARGS)
triton: ## build the image of Triton (docs/triton.md)
	scripts/bootstrap.sh && .venv/bin/python scripts/triton_image.py $(ARGS)

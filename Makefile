# Everything runs in .venv; `make up` and `make test` set it up themselves.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
SEEDS ?= 2000
PROTOS := $(wildcard protos/forebay/rpc/v1/*.proto)
CSRC := $(sort $(wildcard $(foreach ending,h cuh cpp cu,kernels/forebay_kernels/csrc/*.$(ending) kernels/forebay_kernels/csrc/*/*.$(ending))))

.PHONY: up down status install proto check test gpu-check sim sim-bugs chaos vanish bench-routing clean

up: .venv/.kernels ## start the platform; options go into ARGS, as in make up ARGS="--engine sim"
	$(BIN)/forebay up $(ARGS)

down: .venv/.local ## end it
	$(BIN)/forebay down

status: .venv/.local ## workers, load, KV blocks
	$(BIN)/forebay status $(ARGS)

install: .venv/.dev ## everything for development

.venv/.venv:
	$(PYTHON) -c 'import sys; sys.exit("Forebay needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	touch $@

# torch first and by its exact version, so that a CPU build in a local folder is preferred.
.venv/.local: .venv/.venv pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[local]'
	touch $@

.venv/.dev: .venv/.local
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# What this machine runs, so that no worker compiles while somebody waits; workers look there too.
# Without a compiler, or with one that fails, the operations run on plain torch.
.venv/.kernels: .venv/.local $(CSRC)
	-$(BIN)/python -m forebay_kernels.build \
		--cache "$${FOREBAY_CACHE_DIR:-$${XDG_CACHE_HOME:-$$HOME/.cache}/forebay}/kernels"
	touch $@

.venv/.all-kernels: .venv/.dev $(CSRC)
	-$(BIN)/python -m forebay_kernels.build --variant all
	touch $@

proto: .venv/.dev ## regenerate services/forebay/rpc/v1 from protos/
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc --proto_path=protos \
		--python_out=services --grpc_python_out=services \
		--mypy_out=quiet:services --mypy_grpc_out=quiet:services $(PROTOS)

check: .venv/.dev ## formatting, lint, types, import contracts, protocols
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(BIN)/mypy
	PYTHONPATH=services:kernels:loadtest $(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python .ci/check_generated.py $(PROTOS)

test: .venv/.dev .venv/.all-kernels ## the whole suite; a part of it: make test ARGS="tests/unit"
	$(BIN)/python -m pytest $(ARGS)

# Sets nothing up: a GPU machine brings torch, nvcc and pytest, and may reach no package registry.
gpu-check: ## kernels on a GPU: correctness, speed, peers, sanitizer, profile; docs/kernels.md
	PYTHONPATH=kernels $(PYTHON) -m forebay_kernels.gpu_check $(ARGS)

chaos: .venv/.dev ## real faults under 32 streams, both engines: 20 minutes
	$(BIN)/python -m forebay_loadtest.chaos --output loadtest/results/chaos.json $(ARGS)

vanish: .venv/.dev ## 1,000 clients that go away at every phase, then 100 with the real model
	$(BIN)/python -m forebay_loadtest.vanish --output loadtest/results/vanish-sim.json $(ARGS)
	$(BIN)/python -m forebay_loadtest.vanish --engine torch --output loadtest/results/vanish-torch.json

sim: .venv/.dev ## seeded runs of whole platforms under faults, in virtual time: make sim SEEDS=10000
	$(BIN)/python -m forebay.simulator --seeds $(SEEDS)

sim-bugs: .venv/.dev ## the simulator finds its planted bugs
	$(BIN)/python tests/sim/planted_bugs.py

bench-routing: .venv/.dev ## every routing policy over a trace, with plots: make bench-routing TRACE=file
	$(BIN)/python -m forebay_loadtest.routing.offline $(if $(TRACE),--trace $(TRACE)) $(ARGS)

clean: ## what the other targets made
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .gpu-check

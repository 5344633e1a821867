# One command for each thing: `make help` lists them. Needs make and Python 3.11 or 3.12 with its venv module; all else
# is installed into .venv, at the versions of constraints.txt.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help setup train test lint unit worker integration long cluster lowest faults jobs-vision gpu fuzz audit benchmark clean

BIN := .venv/bin
INSTALLED := .venv/installed

# One test on each core, four at most: each process imports torch.
AT_ONCE := --numprocesses logical --maxprocesses 4 --dist loadfile

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(INSTALLED) ## make .venv with everything that raymill and its tests need
	@:

train: setup ## get MNIST and train the job jobs/mnist on two workers
	$(BIN)/raymill data get mnist
	$(BIN)/raymill train jobs/mnist/job.yaml

test: lint unit worker integration ## lint, then every test, fastest first

lint: setup ## formatting, style, types, directions of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: setup ## pure code, without Ray, and a few fuzzed inputs: seconds
	$(BIN)/pytest $(AT_ONCE) tests/unit tests/fuzz

worker: setup ## torch on the CPU, one process and two
	$(BIN)/pytest -m "not long" tests/worker

integration: setup ## whole runs on a local Ray: minutes
	$(BIN)/pytest $(AT_ONCE) -m "not cluster and not long" tests/faults tests/integration

long: setup ## at length what `make integration` shows in short: searches killed at random moments, a full disk; half an hour
	$(BIN)/pytest -m long tests/worker tests/integration

cluster: setup ## a Ray cluster of several nodes on this machine: lost and added nodes, no shared folder; minutes
	$(BIN)/pytest -m cluster tests/integration

lowest: ## the tests at the lowest versions that pyproject.toml allows, in .venv-lowest: a quarter of an hour
	@test -e .venv-lowest/installed || { python=$$($(FIND_PYTHON)) && "$$python" -m venv --clear .venv-lowest; }
	@PIP_CONSTRAINT=constraints-lowest.txt PIP_BUILD_CONSTRAINT=constraints-lowest.txt \
		.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch .venv-lowest/installed
	.venv-lowest/bin/pytest -m "not long" tests/unit tests/worker
	.venv-lowest/bin/pytest -m "not cluster and not cluster_short and not long" tests/integration tests/faults

faults: setup ## every fault that can be provoked here, with what came of it: an hour
	$(BIN)/raymill data get mnist
	PYTHONPATH=tests $(BIN)/python -m faults.run_faults --json .raymill/faults.json

jobs-vision: setup ## train every job about pictures, and hold what it reaches against what it must: three quarters of an hour
	rm -f .raymill/jobs-vision.json
	$(BIN)/python tests/catalogue/train_jobs.py --out .raymill/jobs-vision.json mnist fashion_mnist transfer resnet \
		faster_rcnn yolo unet gan vae custom_layers contrastive contrastive_probe

gpu: setup ## what only a GPU shows: order, the same bits after a kill, bf16, fp16, compile, speed beside plain PyTorch
	$(BIN)/raymill data get mnist
	$(BIN)/pytest -s tests/gpu

fuzz: setup ## random inputs to all that reads files, packets and what users write: an hour, prints its seeds
	RAYMILL_FUZZ_S=3600 $(BIN)/pytest -s --timeout=0 tests/fuzz

audit: setup ## what is installed against its hashes and constraints.txt, and known advisories; asks a database outside
	$(BIN)/python .ci/audit.py

benchmark: setup .venv-peers/installed ## raymill beside the guide's way, torchrun and other streams, and what safety costs: two hours, wants a quiet machine
	$(BIN)/raymill data get mnist
	$(BIN)/python tests/benchmarks/throughput.py --data .raymill/data/mnist --out .raymill/throughput.json
	$(BIN)/python tests/benchmarks/startup.py --data .raymill/data/mnist --out .raymill/startup.json
	$(BIN)/python tests/benchmarks/overhead.py --data .raymill/data/mnist --out .raymill/overhead.json
	$(BIN)/python tests/benchmarks/streams/contest.py --peers .venv-peers/bin/python --out .raymill/streams.json

# The streams that raymill's is held against, in a place of their own: not all of them go with raymill's versions.
.venv-peers/installed: tests/benchmarks/streams/requirements.txt
	@python=$$($(FIND_PYTHON)) && "$$python" -m venv --clear .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

clean: ## remove .venv and what the tools leave behind; data sets and runs in .raymill stay
	rm -rf .venv .venv-lowest .venv-peers .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	find platform pipelines jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv without the mark is what a failed or interrupted installation left: it is made anew.
# pip reads the constraints from its environment so that they also hold for what builds the package.
$(INSTALLED): pyproject.toml constraints.txt
	@test -e $@ || { python=$$($(FIND_PYTHON)) && "$$python" -m venv --clear .venv; }
	@echo "installing into .venv (some minutes and 7 GB the first time)"
	@PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# Prints the first usable Python: $PYTHON, python3.11, python3.12 or python3.
define FIND_PYTHON
{ for python in $(PYTHON) python3.11 python3.12 python3; do \
	if "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; \
	then echo "$$python"; exit 0; fi; \
done; \
echo "raymill needs Python 3.11 or 3.12 and found neither. Install one (Debian: apt-get install python3.11" \
	"python3.11-venv), or name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
endef

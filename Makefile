# All targets work on a fresh machine, with or without a GPU: each sets up .venv first (quick when nothing changed).
#   make demo                                  the same question with and without R-KV, and one table
#   make test                                  set-up, checks and every test
#   make bench-smoke                           every benchmark, tiny, and a check of what it writes
#   make serve [MODEL=...] [ARGS="..."]        an SGLang server with --kv-policy rkv, in the foreground
#   make compat SGLANG=0.5.x                   another release of SGLang, in an environment of its own: what of the
#                                              contract differs there, then the tests that meet SGLang
#   make compile TRITON=3.x.0                  every kernel, compiled by another release of Triton for three GPUs
#   make dist                                  a source distribution and a wheel, in dist/
#   make dist-check                            a server from that wheel in a fresh environment, and one request
# Variables: PYTHON (3.11 or newer), DEVICE=cpu|gpu, TORCH_INDEX_URL, MODEL, PORT, ARGS, SGLANG, TRITON.

PYTHON ?= python3
PORT ?= 30000
SMALL_MODEL := .cache/models/SmolLM2-135M-Instruct
BIN := .venv/bin
COMPAT = RKV_SGLANG_ALLOW_UNTESTED=1 .cache/compat/$(SGLANG)/bin
# A file's tests stay on one worker, so that they share its servers; tests/conftest.py has long ones come first.
PYTEST_FLAGS := -n 2 --dist loadfile --no-loadscope-reorder --durations=15

# Processes of the tests live for seconds; compiling this package anew is a good part of that.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test bench-smoke compat compile check serve dist dist-check clean distclean

setup:
	@$(PYTHON) devtools/env/setup.py $(if $(DEVICE),--device $(DEVICE))

demo: setup
	@$(BIN)/python -m devtools.demo --model $(or $(MODEL),$(SMALL_MODEL)) $(ARGS)

serve: setup
	@exec $(BIN)/python -m devtools.launch --model-path $(or $(MODEL),$(SMALL_MODEL)) --port $(PORT) --kv-policy rkv $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py tests/test_house.py

test: check
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then set -x; $(BIN)/python -m pytest $(PYTEST_FLAGS) $(ARGS); \
	else set -x; $(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not gpu" $(ARGS); fi

bench-smoke: setup
	@$(BIN)/python -m benchmarks.smoke --jobs 2 $(ARGS)

# What is made from the release of the project itself has its own tests, which are left out.
compat:
	@test -n "$(SGLANG)" || { echo "name a release: make compat SGLANG=0.5.x" >&2; exit 2; }
	@$(PYTHON) devtools/env/setup.py --sglang $(SGLANG) $(if $(DEVICE),--device $(DEVICE))
	$(COMPAT)/rkv-sglang doctor --contract
	$(COMPAT)/python -m pytest $(PYTEST_FLAGS) tests/integration tests/e2e \
	  --ignore tests/integration/hooking/test_contract.py --ignore tests/integration/test_patches.py $(ARGS)

# A release that the environment does not have; torch is its own.
compile: setup
	@test -n "$(TRITON)" || { echo "name a release: make compile TRITON=3.x.0" >&2; exit 2; }
	@test -d .cache/triton/$(TRITON)/triton || \
	  $(BIN)/python -m pip install --quiet --no-deps --target .cache/triton/$(TRITON) triton==$(TRITON)
	PYTHONPATH=.cache/triton/$(TRITON) $(BIN)/python -m tests.kernels.aot --jobs 2

# One of an older version would be taken for this one's.
dist: setup
	@rm -rf dist
	@$(BIN)/python -m devtools.dist

dist-check: dist
	@$(BIN)/python -m devtools.dist_check

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf devtools/env/sgl_kernel_standin/build devtools/env/sgl_kernel_standin/*.egg-info
	find rkv_sglang tests benchmarks devtools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .cache

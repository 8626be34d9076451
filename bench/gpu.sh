#!/usr/bin/env bash
# Builds in place, runs the operators' GPU tests and the benches, and writes what it finds, within ten minutes and
# without network. Says in one line each what is missing or wrong, and runs what can still run. Without a GPU it is a
# rehearsal with small shapes. bench/gpu.py describes the files of results; bench/table.py prints several runs.
#   OUT=DIR              where the run gets its folder DATE-GPU-COMMIT (bench/results)
#   PARTS=a,b            some of tests,kernels,blocks,steps,ncu,sanitizer (tests,kernels,blocks,ncu)
#   CASES=EXPRESSION     only these benches (pytest -k), such as '720p and not compile'
#   TESTS=FILES          the tests of the part tests, with flags of pytest (tests/ops)
#   FLG_GPU_SECONDS=570  seconds in all
#   BUILT=1              take the compiled module in fastlightgen/ as it is, built elsewhere for the same Python and GPU
#   PYTHON=python3       needs torch, pybind11, setuptools, cmake, ninja, pytest, pytest-benchmark
# Packages that the machine lacks travel as wheels: bench/wheels.sh fetches them, this script installs them.
set -uo pipefail
[[ -z ${OUT:-} ]] || OUT=$(realpath -m "$OUT") || exit # relative to the caller's folder
export OUT=${OUT:-}
cd "$(dirname "$0")/.." || exit
PY=${PYTHON:-python3}
unset PYTEST_ADDOPTS # flags meant for the caller's own tests, a limit of coverage for one
command -v "$PY" >/dev/null || { echo "$PY was not found; set PYTHON"; exit 2; }
export PYTHONPATH=$PWD:$PWD/build/bench-site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec "$PY" bench/gpu.py

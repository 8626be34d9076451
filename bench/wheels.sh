#!/usr/bin/env bash
# Fetches into bench/wheels the packages that a GPU machine without network lacks, and says their size. bench/gpu.sh
# installs them there. git ignores the folder, so copy it along. The machine has torch, Triton, numpy, pytest and the
# rest; TARGET is its version of Python. setuptools is installed only where the machine's is older than 77, which cannot
# build this package.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
MISSING=(nvidia-cutlass omegaconf diffusers importlib-metadata lazy-importer liger-kernel==0.8.5 setuptools)
LIMIT=$((64 << 20)) # bytes that may travel in all

rm -rf bench/wheels
mkdir bench/wheels
$PY -m pip --disable-pip-version-check download -qq --no-deps --only-binary=:all: --python-version "${TARGET:-3.12}" \
  -c constraints.txt -d bench/wheels "${MISSING[@]}"
$PY bench/machine.py >bench/wheels/commit
wheels=$(cat bench/wheels/* | wc -c)
tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 cat | wc -c)
say() { echo "$1: $(($2 * 10 / (1 << 20) / 10)).$(($2 * 10 / (1 << 20) % 10)) MiB"; }
say "$(ls bench/wheels/*.whl | wc -l) wheels in bench/wheels" "$wheels"
say "with the sources" $((wheels + tree))
((wheels + tree <= LIMIT)) || { echo "more than 64 MiB may not travel"; exit 1; }

#!/usr/bin/env bash
# On a machine with a GPU and nvcc, without a network: build in place, run the GPU tests and the benches, keep one table.
# Needs torch, triton, pybind11, numpy, setuptools, cmake, ninja, pytest, pytest-benchmark in the Python that runs it.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-python3}
export PYTHONPATH=$PWD FLG_BUILD_CUDA=1

$PY setup.py -q build_ext --inplace >build.log 2>&1 || { tail -n 20 build.log; exit 1; }
rm -f build.log
$PY -m fastlightgen.ops
$PY -m pytest tests/ops -q -m 'not slow' -o addopts= -p no:cacheprovider

gpu=$($PY -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())')
mkdir -p bench/results
raw=$(mktemp)
$PY -m pytest bench --benchmark-only -q -o addopts= -p no:cacheprovider --benchmark-json="$raw"
$PY - "$raw" "bench/results/$gpu.json" <<'PYTHON'
import json, sys
import torch

raw, out = sys.argv[1:]
rows = [{"group": b["group"], **b["extra_info"]} for b in json.load(open(raw))["benchmarks"]]
rows = [{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
json.dump({"machine": machine, "rows": rows}, open(out, "w"), indent=1)
for row in rows:
    print(f"{row['group']:<45} {row['contender']:<14} {row['us']:9.1f} us {row['GB/s']:7.0f} GB/s {row['of_copy']:6.2f} of copy")
print("written to", out)
PYTHON
rm -f "$raw"

#!/usr/bin/env bash
# Builds in place, runs the GPU tests and the kernel benches, and writes one table, within ten minutes. Needs a GPU and
# nvcc, but no network.
# The Python that runs it needs torch, triton, pybind11, numpy, setuptools, cmake, ninja, pytest and pytest-benchmark.
# It uses CUTLASS headers (FLG_CUTLASS or the nvidia-cutlass wheel), diffusers, liger-kernel, quack-kernels if present.
# If a part fails or runs out of time, the script says so and goes on with the next part.
set -uo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-python3}
export PYTHONPATH=$PWD FLG_BUILD_CUDA=1 HF_HUB_OFFLINE=1
status=0

left() { echo $((${FLG_GPU_SECONDS:-570} - SECONDS)); } # seconds left of the ten minutes
# The smaller of $1 and the seconds left.
most() { echo $(($1 < $(left) ? $1 : $(left))); }

timeout "$(most 240)" $PY setup.py -q build_ext --inplace >build.log 2>&1 ||
  { tail -n 20 build.log; echo "the compiled part was not built; the rest goes on"; status=1; }
rm -f build.log
$PY -m fastlightgen.ops || exit 1
timeout "$(most 150)" $PY -m pytest tests/ops -q -m 'not slow' -k 'gpu or GPU' -o addopts= -p no:cacheprovider || status=1

# Each file gets an equal share of the remaining time and stops by itself when it is over. The next files get what it
# leaves. A file that hangs is killed. Every row is written as soon as it is measured.
files=(overhead dmd_gradient gate_residual_norm_modulate block attention qk_norm_rope linear norm_modulate)
raw=$(mktemp -d)
export FLG_BENCH_ROWS=$raw/rows
for i in "${!files[@]}"; do
  share=$(($(left) / (${#files[@]} - i)))
  ((share > 5)) || { echo "no time for bench_${files[$i]}"; status=1; continue; }
  FLG_BENCH_CAP=$((share * 2 / 3)) timeout "$(most $((share + 40)))" $PY -m pytest "bench/bench_${files[$i]}.py" --benchmark-only -q \
    -o addopts= -p no:cacheprovider --benchmark-columns=median >"$raw/$i.log" 2>&1 ||
    { echo "bench_${files[$i]} ended with $? (124: out of time)"; grep '^E  ' "$raw/$i.log" | head -n 5; status=1; }
done
$PY bench/table.py "$raw/rows" || status=1
rm -rf "$raw"
echo "$SECONDS seconds"
exit $status

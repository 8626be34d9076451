#!/usr/bin/env bash
# On a machine with a GPU and nvcc, without a network: build in place, run the GPU tests and the kernel benches, keep one
# table, within ten minutes. Needs torch, triton, pybind11, numpy, setuptools, cmake, ninja, pytest, pytest-benchmark in
# the Python that runs it; CUTLASS headers (FLG_CUTLASS or the nvidia-cutlass wheel), diffusers, liger-kernel and
# quack-kernels take part where they are there. What fails or does not fit the time is said, and the rest goes on.
set -uo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-python3}
export PYTHONPATH=$PWD FLG_BUILD_CUDA=1 HF_HUB_OFFLINE=1
status=0

left() { echo $((${FLG_GPU_SECONDS:-570} - SECONDS)); } # of the ten minutes
most() { echo $(($1 < $(left) ? $1 : $(left))); }

timeout "$(most 240)" $PY setup.py -q build_ext --inplace >build.log 2>&1 ||
  { tail -n 20 build.log; echo "the compiled part was not built; the rest goes on"; status=1; }
rm -f build.log
$PY -m fastlightgen.ops || exit 1
timeout "$(most 150)" $PY -m pytest tests/ops -q -m 'not slow' -k 'gpu or GPU' -o addopts= -p no:cacheprovider || status=1

# Each file stops by itself after its share, what it leaves goes to the next; a file that hangs is ended. Every row is
# kept as soon as it is measured.
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

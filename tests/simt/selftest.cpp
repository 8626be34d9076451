// A kernel with deliberate synchronisation mistakes, which the shim must detect, and its correct version.
#include <cuda_runtime.h>

#include "flg/runs.h"

namespace {

constexpr int kThreads = 64;
enum Kind { kRight, kNoBarrier, kHalfAtBarrier, kHalfAtShuffle };

__global__ void neighbour_kernel(int kind, float salt, float* out) {
  __shared__ float shared[kThreads];
  const int me = static_cast<int>(threadIdx.x);
  shared[me] = salt + static_cast<float>(me);
  if (kind == kRight || (kind == kHalfAtBarrier && me < 32)) __syncthreads();
  if (kind == kHalfAtShuffle && me < 16) out[me] = __shfl_xor_sync(0xffffffffu, salt, 1);
  out[me] = shared[(me + 1) % kThreads];
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int simt_selftest(int kind, float salt, float* out) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(kThreads);
  return cudaLaunchKernelEx(&config, neighbour_kernel, kind, salt, out);
}

// For test_runs.py: the cut of a tensor into runs. Writes the first and the last row of each run; returns their number.
extern "C" __attribute__((visibility("default"))) int64_t simt_runs(int64_t rows, int64_t rows_per_mod, int64_t workers,
                                                                    int64_t* bounds) {
  const flg::Runs runs = flg::split_rows(rows, rows_per_mod, workers);
  for (int64_t run = 0; bounds != nullptr && run < runs.count; ++run) {
    bounds[2 * run] = runs.first(run);
    bounds[2 * run + 1] = runs.last(run);
  }
  return runs.count;
}

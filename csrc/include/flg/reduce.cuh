// Sums over the threads of a block. The order depends on the shape alone, so every run gives the same bits.
#pragma once

#include <cuda_runtime.h>

namespace flg {

// The sum over the 32 lanes of a warp, in every lane.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}

// kCount sums over kThreads threads with one barrier; every thread gets the same bits. Consecutive calls must use
// different `scratch` arrays. Two arrays in turn suffice: a thread cannot pass the barrier of the next call, and so
// cannot reuse the first array, before all threads have read it.
template <int kThreads, int kCount>
__device__ __forceinline__ void block_sum(float (&v)[kCount], float (&scratch)[kCount][kThreads / 32]) {
  static_assert(kThreads % 32 == 0, "a block must consist of full warps");
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = warp_sum(v[i]);
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scratch[i][threadIdx.x / 32] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    v[i] = 0.f;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) v[i] += scratch[i][w];  // each thread adds them in the same order
  }
}

template <int kThreads>
__device__ __forceinline__ float block_sum(float v, float (&scratch)[1][kThreads / 32]) {
  float one[1] = {v};
  block_sum<kThreads, 1>(one, scratch);
  return one[0];
}

}  // namespace flg

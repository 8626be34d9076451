// Sums over the threads of a block, in an order that depends on nothing but the shape: the same bits at every run.
#pragma once

#include <cuda_runtime.h>

namespace flg {

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}

// kCount sums over kThreads threads at the price of one barrier, the same bits in each thread. `scratch` is this call's
// own: a kernel that alternates between two scratch arrays needs only the barrier inside, because no thread can be two
// sums ahead.
template <int kThreads, int kCount>
__device__ __forceinline__ void block_sum(float (&v)[kCount], float (&scratch)[kCount][kThreads / 32]) {
  static_assert(kThreads % 32 == 0, "a row is shared by whole warps");
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
    for (int w = 0; w < kThreads / 32; ++w) v[i] += scratch[i][w];
  }
}

template <int kThreads>
__device__ __forceinline__ float block_sum(float v, float (&scratch)[1][kThreads / 32]) {
  float one[1] = {v};
  block_sum<kThreads, 1>(one, scratch);
  return one[0];
}

}  // namespace flg

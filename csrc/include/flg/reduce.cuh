// Sums over the threads that share a row: one warp, or a whole block.
#pragma once

namespace flg {

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}

// The sum over kThreads threads, the same bits in each of them. `scratch` is this call's own: a kernel that alternates
// between two scratch arrays needs only the one barrier inside, because no thread can be two reductions ahead.
template <int kThreads>
__device__ __forceinline__ float row_sum(float v, float (&scratch)[kThreads / 32]) {
  static_assert(kThreads % 32 == 0, "a row is shared by whole warps");
  v = warp_sum(v);
  if constexpr (kThreads > 32) {
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0.f;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) v += scratch[w];
  }
  return v;
}

}  // namespace flg

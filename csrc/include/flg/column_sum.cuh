// Second pass of the backward kernels: sums the partial rows of each modulation row in a fixed order, without atomics.
#pragma once

#include "flg/launch.h"

namespace flg {

constexpr int kColumnWarps = 8;
constexpr int kColumns = 32;          // columns of a block: few, so that even narrow rows give every SM a block
constexpr int kLanes = kColumns / 4;  // lanes that read one partial row, 128 bytes

// out[m, c] = sum over r < per_mod of partial[m, r, c], with `width` columns c, a multiple of 4. The 256 threads are 32
// groups of 8 lanes. Group g adds the rows g, g + 32, ...; then each warp adds its four groups, and warp 0 the eight
// warps, in order. Grid: (width / 32 rounded up, modulation rows).
static __global__ void __launch_bounds__(32 * kColumnWarps)
    column_sum_kernel(float* out, const float* partial, int64_t per_mod, int64_t width) {
  __shared__ float4 sums[kColumnWarps][kLanes];
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes, warp = threadIdx.x / 32;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kColumns + 4 * lane;  // first of the lane's four columns
  float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
  if (col < width) {
    const float* p = partial + static_cast<int64_t>(blockIdx.y) * per_mod * width + col;
#pragma unroll 4
    for (int64_t r = group; r < per_mod; r += 32 * kColumnWarps / kLanes) {
      const float4 v = __ldcs(reinterpret_cast<const float4*>(p + r * width));  // read once: evict first
      total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
    }
  }
#pragma unroll
  for (int apart = kLanes; apart < 32; apart *= 2) {  // adds the groups of a warp
    total.x += __shfl_xor_sync(0xffffffffu, total.x, apart);
    total.y += __shfl_xor_sync(0xffffffffu, total.y, apart);
    total.z += __shfl_xor_sync(0xffffffffu, total.z, apart);
    total.w += __shfl_xor_sync(0xffffffffu, total.w, apart);
  }
  if (threadIdx.x % 32 < kLanes) sums[warp][lane] = total;
  __syncthreads();
  if (threadIdx.x < kLanes && col < width) {
#pragma unroll
    for (int w = 1; w < kColumnWarps; ++w) {
      const float4 v = sums[w][lane];
      total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
    }
    // nvcc compiled a plain assignment into four stores of 4 bytes; the intrinsic stores 16 bytes at once.
    __stwb(reinterpret_cast<float4*>(out + static_cast<int64_t>(blockIdx.y) * width + col), total);
  }
}

inline cudaError_t column_sums(float* out, const float* partial, int64_t mods, int64_t per_mod, int64_t width,
                               void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(width, kColumns)), static_cast<unsigned>(mods));
  return launch(column_sum_kernel, grid, 32 * kColumnWarps, stream, false, out, partial, per_mod, width);
}

}  // namespace flg

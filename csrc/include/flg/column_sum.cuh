// Second pass of the backward kernels: sums the partial rows of each modulation row in a fixed order, without atomics.
#pragma once

#include "flg/launch.h"

namespace flg {

constexpr int kColumnWarps = 8;

// out[m, c] = sum over r < per_mod of partial[m, r, c], with `width` columns c, a multiple of 4. Warp w adds the rows
// w, w + 8, ...; warp 0 then adds the eight sums in order. Grid: (width / 128 rounded up, modulation rows).
static __global__ void __launch_bounds__(32 * kColumnWarps)
    column_sum_kernel(float* out, const float* partial, int64_t per_mod, int64_t width) {
  __shared__ float4 sums[kColumnWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * 32 + lane) * 4;  // first of the lane's four columns
  float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
  if (col < width) {
    const float* p = partial + static_cast<int64_t>(blockIdx.y) * per_mod * width + col;
#pragma unroll 4
    for (int64_t r = warp; r < per_mod; r += kColumnWarps) {
      const float4 v = __ldcs(reinterpret_cast<const float4*>(p + r * width));  // read once: evict first
      total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
    }
  }
  sums[warp][lane] = total;
  __syncthreads();
  if (warp == 0 && col < width) {
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
  const dim3 grid(static_cast<unsigned>(ceil_div(width, 128)), static_cast<unsigned>(mods));
  return launch(column_sum_kernel, grid, 32 * kColumnWarps, stream, false, out, partial, per_mod, width);
}

}  // namespace flg

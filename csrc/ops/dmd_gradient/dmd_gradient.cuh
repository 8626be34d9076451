// Two passes over a latent that fits the L2 cache, with a grid-wide barrier between them. This needs no second launch,
// no temporary tensor and no copy to the host. All sums run in a fixed order.
#pragma once

#include <cooperative_groups.h>

#include "dmd_gradient.h"
#include "flg/reduce.cuh"
#include "flg/vec.cuh"

namespace flg {

constexpr int kDmdThreads = 256;

// v_real of Eq. 9 for eight elements.
template <typename V>
__device__ __forceinline__ void well_guided(const flg_dmd_gradient_params& p, int64_t at, float beta1, float beta2,
                                            float (&v)[kVec]) {
  float weak[kVec], strong[kVec];
  unpack(load(static_cast<const V*>(p.v_weak_null) + at), v);
  unpack(load(static_cast<const V*>(p.v_weak_cond) + at), weak);
  unpack(load(static_cast<const V*>(p.v_strong_cond) + at), strong);
#pragma unroll
  for (int j = 0; j < kVec; ++j) v[j] = beta1 * (weak[j] - v[j]) + beta2 * (strong[j] - weak[j]) + v[j];
}

template <typename T, typename V>
__global__ void __launch_bounds__(kDmdThreads, 3) dmd_gradient_kernel(const flg_dmd_gradient_params p) {
  __shared__ float scratch[2][1][kDmdThreads / 32];
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kDmdThreads + threadIdx.x) * kVec;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kDmdThreads * kVec;

  // Pass 1: this block's part of sum |x0 - x0_real| of each sample, with x0_real = x_t - t v_real.
  for (int64_t b = 0; b < p.samples; ++b) {
    const float t = p.t[b], beta1 = p.beta1[b], beta2 = p.beta2[b];
    float sum = 0.f;
    for (int64_t i = first; i < p.size; i += step) {
      const int64_t at = b * p.size + i;
      float x0[kVec], x_t[kVec], v_real[kVec];
      unpack(load(static_cast<const T*>(p.x0) + at), x0);
      unpack(load(static_cast<const T*>(p.x_t) + at), x_t);
      well_guided<V>(p, at, beta1, beta2, v_real);
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum += fabsf(x0[j] - (x_t[j] - t * v_real[j]));
    }
    sum = block_sum<kDmdThreads>(sum, scratch[b % 2]);
    if (threadIdx.x == 0) p.partial[b * FLG_DMD_GRADIENT_BLOCKS + blockIdx.x] = sum;
  }

  cooperative_groups::this_grid().sync();

  // Pass 2: grad = t (v_real - v_fake) / normaliser. v_real is computed again: its inputs are in the L2 cache.
  for (int64_t b = 0; b < p.samples; ++b) {
    const float t = p.t[b], beta1 = p.beta1[b], beta2 = p.beta2[b];
    float sum = 0.f;  // every block adds all partial sums itself, which is cheaper than a second barrier
    for (int64_t i = threadIdx.x; i < gridDim.x; i += kDmdThreads) sum += p.partial[b * FLG_DMD_GRADIENT_BLOCKS + i];
    sum = block_sum<kDmdThreads>(sum, scratch[b % 2]);
    const float normaliser = sum / static_cast<float>(p.size) + 1e-6f, factor = t / normaliser;
    if (blockIdx.x == 0 && threadIdx.x == 0) p.normaliser[b] = normaliser;
    for (int64_t i = first; i < p.size; i += step) {
      const int64_t at = b * p.size + i;
      float v_real[kVec], v_fake[kVec];
      well_guided<V>(p, at, beta1, beta2, v_real);
      unpack(load(static_cast<const V*>(p.v_fake) + at), v_fake);
#pragma unroll
      for (int j = 0; j < kVec; ++j) v_real[j] = factor * (v_real[j] - v_fake[j]);
      store(static_cast<T*>(p.grad) + at, v_real);
    }
  }
}

}  // namespace flg

// LayerNorm without affine, then modulation. Bound by memory: each row is read once, written once, and waits in
// registers.
#pragma once

#include "flg/reduce.cuh"
#include "flg/vec.cuh"
#include "norm_modulate.h"

namespace flg {

constexpr int kBlock = 128;

// Blocks per SM asked of the compiler: a third one at 5120 in 16 bits fits the registers and keeps 30 KB in flight.
template <typename T, int kVecs>
constexpr int kMinBlocks = sizeof(T) == 2 && kVecs == 5 ? 3 : 1;

// Real widths: dim = kThreads * kVecs * 8 exactly. kThreads threads share a row; kBlock / kThreads rows per block.
// Each group walks a run of consecutive rows, which mostly share one modulation row: it stays in registers.
template <typename T, int kThreads, int kVecs>
__global__ void __launch_bounds__(kBlock, kMinBlocks<T, kVecs>)
    norm_modulate_kernel(const flg_norm_modulate_params p, int64_t rows_per_group) {
  static_assert(kThreads == 32 || kThreads == kBlock, "a group is a warp (no barrier) or the block");
  constexpr int kDim = kThreads * kVecs * kVec;
  __shared__ float scratch[2][kThreads / 32];
  const int lane = threadIdx.x % kThreads;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * (kBlock / kThreads) + threadIdx.x / kThreads;
  const int64_t first = group * rows_per_group;
  const int64_t last = min(first + rows_per_group, p.rows);
  if (first >= last) return;

  const T* x = static_cast<const T*>(p.x) + first * kDim + lane * kVec;
  T* out = static_cast<T*>(p.out) + first * kDim + lane * kVec;
  float gain[kVecs][kVec], shift[kVecs][kVec];
  int64_t mod = -1;
  Packed<T> next[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) next[i] = load_once(x + i * kThreads * kVec);

  for (int64_t row = first; row < last; ++row) {
    float v[kVecs][kVec];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) unpack(next[i], v[i]);

    // The next row travels while this one is reduced.
    x += kDim;
    if (row + 1 < last) {
#pragma unroll
      for (int i = 0; i < kVecs; ++i) next[i] = load_once(x + i * kThreads * kVec);
    }

    if (mod != row / p.rows_per_mod) {
      mod = row / p.rows_per_mod;
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const int64_t col = (i * kThreads + lane) * kVec;
        load_mod(p.scale + mod * p.scale_stride + col, gain[i]);
        load_mod(p.shift + mod * p.shift_stride + col, shift[i]);
#pragma unroll
        for (int j = 0; j < kVec; ++j) gain[i][j] += 1.f;
      }
    }

    // Mean, then the centred squares: the residual stream has means that E[x^2] - E[x]^2 would lose digits to.
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < kVecs; ++i)
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum += v[i][j];
    const float mean = row_sum<kThreads>(sum, scratch[0]) * (1.f / kDim);
#pragma unroll
    for (int i = 0; i < kVecs; ++i)
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        v[i][j] -= mean;
        squares += v[i][j] * v[i][j];
      }
    const float rstd = rsqrtf(row_sum<kThreads>(squares, scratch[1]) * (1.f / kDim) + p.eps);

#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) v[i][j] = v[i][j] * rstd * gain[i][j] + shift[i][j];
      store(out + i * kThreads * kVec, v[i]);
    }
    out += kDim;
  }
}

// Any other width: one block per row, which is read three times (twice from cache).
template <typename T>
__global__ void __launch_bounds__(kBlock) norm_modulate_any_kernel(const flg_norm_modulate_params p) {
  __shared__ float scratch[2][kBlock / 32];
  const float inv_dim = 1.f / static_cast<float>(p.dim);
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* __restrict__ x = static_cast<const T*>(p.x) + row * p.dim;
    T* __restrict__ out = static_cast<T*>(p.out) + row * p.dim;
    const float* scale = p.scale + row / p.rows_per_mod * p.scale_stride;
    const float* shift = p.shift + row / p.rows_per_mod * p.shift_stride;
    float v[kVec], sum = 0.f, squares = 0.f;
    for (int64_t col = threadIdx.x * kVec; col < p.dim; col += kBlock * kVec) {
      unpack(load(x + col), v);
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum += v[j];
    }
    const float mean = row_sum<kBlock>(sum, scratch[0]) * inv_dim;
    for (int64_t col = threadIdx.x * kVec; col < p.dim; col += kBlock * kVec) {
      unpack(load(x + col), v);
#pragma unroll
      for (int j = 0; j < kVec; ++j) squares += (v[j] - mean) * (v[j] - mean);
    }
    const float rstd = rsqrtf(row_sum<kBlock>(squares, scratch[1]) * inv_dim + p.eps);
#pragma unroll 1  // unrolled, ptxas splits the 16-byte stores
    for (int64_t col = threadIdx.x * kVec; col < p.dim; col += kBlock * kVec) {
      float a[kVec], b[kVec];
      unpack(load(x + col), v);
      load_mod(scale + col, a);
      load_mod(shift + col, b);
#pragma unroll
      for (int j = 0; j < kVec; ++j) v[j] = (v[j] - mean) * rstd * (1.f + a[j]) + b[j];
      store(out + col, v);
    }
  }
}

}  // namespace flg

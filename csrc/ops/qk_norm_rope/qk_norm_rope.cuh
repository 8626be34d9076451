// RMS norm and rotary embedding of q (blockIdx.y = 0) and k (1), forward and backward. The kernels are bound by memory:
// each row is read once, kept in registers and written once. A vector of eight channels holds four rotary pairs, so no
// rotation needs data of another thread.
#pragma once

#include "flg/reduce.cuh"
#include "flg/row.cuh"
#include "flg/runs.h"
#include "qk_norm_rope.h"

namespace flg {

// Blocks per SM that the compiler must leave registers for: 20 warps forward, 12 backward.
template <typename T, typename W>
constexpr int kRopeForwardBlocks = W::kExact && sizeof(T) == 2 ? 640 / W::kThreads : 1;
template <typename T, typename W>
constexpr int kRopeBackwardBlocks = W::kExact && sizeof(T) == 2 ? 384 / W::kThreads : 1;

// Cosine and sine of the four channel pairs that start at `channel` of a head, for token number `token` of the grid.
struct Rotation {
  float2 pair[kVec / 2];
  __device__ __forceinline__ Rotation(const flg_rope& rope, int token, int channel) {
    const int plane = rope.size[1] * rope.size[2];
    const int at[3] = {token / plane, token / rope.size[2] % rope.size[1], token % rope.size[2]};  // frame, row, column
#pragma unroll
    for (int j = 0; j < kVec / 2; ++j) {
      // Pairs are ordered frames, rows, columns: find the pair's axis and its index there.
      int axis = 0, index = channel / 2 + j;
      if (index >= rope.pairs[0]) index -= rope.pairs[0], axis = 1;
      if (axis == 1 && index >= rope.pairs[1]) index -= rope.pairs[1], axis = 2;
      const float* table = axis == 0 ? rope.factors[0] : axis == 1 ? rope.factors[1] : rope.factors[2];
      const int where = axis == 0 ? at[0] : axis == 1 ? at[1] : at[2];
      const int width = axis == 0 ? rope.pairs[0] : axis == 1 ? rope.pairs[1] : rope.pairs[2];
      pair[j] = __ldg(reinterpret_cast<const float2*>(table) + where * width + index);
    }
  }
  // Rotates the four pairs of v by their angles (direction 1) or back (direction -1).
  __device__ __forceinline__ void turn(float (&v)[kVec], float direction) const {
#pragma unroll
    for (int j = 0; j < kVec / 2; ++j) {
      const float a = v[2 * j], b = v[2 * j + 1], sine = direction * pair[j].y;
      v[2 * j] = a * pair[j].x - b * sine;
      v[2 * j + 1] = a * sine + b * pair[j].x;
    }
  }
};

// Sums each of v over the lanes of a head: head_dim / 8 neighbouring lanes of a warp, a power of two.
template <int kCount>
__device__ __forceinline__ void head_sum(float (&v)[kCount], int lanes) {
  for (int lane = lanes / 2; lane > 0; lane /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], lane);
  }
}

// This thread's part of the norm's weight: [dim], or [head_dim] repeated for every head.
template <typename W>
__device__ __forceinline__ void load_weight(const float* weight, int head_dim, int per_head, const Columns<W>& col,
                                            float (&v)[kVecs][kVec]) {
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[i][j] = 0.f;
    if (col.inside(i)) load_shared_row(weight + (per_head ? col.at(i) % head_dim : col.at(i)), v[i]);
  }
}

// Replaces each vector's sums by the sums over its norm group: its head (per_head) or the full row.
template <typename W, int kCount>
__device__ __forceinline__ void group_sums(float (&sums)[kVecs][kCount], int per_head, int head_dim,
                                           float (&scratch)[kCount][W::kThreads / 32]) {
  if (per_head) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) head_sum(sums[i], head_dim / kVec);
    return;
  }
#pragma unroll
  for (int i = 1; i < kVecs; ++i)
#pragma unroll
    for (int k = 0; k < kCount; ++k) sums[0][k] += sums[i][k];
  block_sum<W::kThreads, kCount>(sums[0], scratch);
#pragma unroll
  for (int i = 1; i < kVecs; ++i)
#pragma unroll
    for (int k = 0; k < kCount; ++k) sums[i][k] = sums[0][k];
}

template <typename T, typename W>
__global__ void __launch_bounds__(W::kThreads, kRopeForwardBlocks<T, W>)
    qk_norm_rope_kernel(const flg_qk_norm_rope_params p, const Runs runs) {
  __shared__ float scratch[2][1][W::kThreads / 32];
  const Columns<W> col(p.dim);
  const bool q = blockIdx.y == 0;
  const void* in = q ? p.in[0] : p.in[1];
  T* out = static_cast<T*>(q ? p.out[0] : p.out[1]);
  const int grid_tokens = p.rope.size[0] * p.rope.size[1] * p.rope.size[2];
  const float inv_group = 1.f / static_cast<float>(p.per_head ? p.head_dim : static_cast<int>(col.dim));
  float weight[kVecs][kVec];
  load_weight(q ? p.weight[0] : p.weight[1], p.head_dim, p.per_head, col, weight);

  const int64_t last = runs.last(blockIdx.x);
  int64_t row = runs.first(blockIdx.x);
  Row<T, W> x;
  x.load(in, row, col);
  for (; row < last; ++row) {
    const int token = static_cast<int>(row % p.tokens);
    float v[kVecs][kVec], sums[kVecs][1] = {};
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      unpack(x.part[i], v[i]);
#pragma unroll
      for (int j = 0; j < kVec; ++j) sums[i][0] += v[i][j] * v[i][j];
    }
    if (row + 1 < last) x.load(in, row + 1, col);                   // load the next row while this one is reduced
    group_sums<W>(sums, p.per_head, p.head_dim, scratch[row % 2]);  // two scratch arrays in turn, see block_sum
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      if (!col.inside(i)) continue;
      const float rstd = rsqrtf(sums[i][0] * inv_group + p.eps);
#pragma unroll
      for (int j = 0; j < kVec; ++j) v[i][j] *= rstd * weight[i][j];
      if (token < grid_tokens) Rotation(p.rope, token, col.at(i) % p.head_dim).turn(v[i], 1.f);
      store(out + row * col.dim + col.at(i), v[i]);
    }
  }
}

// With n = x rstd, b = dout rotated back and g = weight b: dx = rstd (g - n mean(g n)), dweight = sum n b.
template <typename T, typename W>
__global__ void __launch_bounds__(W::kThreads, kRopeBackwardBlocks<T, W>)
    qk_norm_rope_backward_kernel(const flg_qk_norm_rope_backward_params p, const Runs runs) {
  __shared__ float scratch[2][2][W::kThreads / 32];
  const Columns<W> col(p.dim);
  const bool q = blockIdx.y == 0;
  const void* in = q ? p.in[0] : p.in[1];
  const void* dout = q ? p.dout[0] : p.dout[1];
  T* dx = static_cast<T*>(q ? p.dx[0] : p.dx[1]);
  const int grid_tokens = p.rope.size[0] * p.rope.size[1] * p.rope.size[2];
  const float inv_group = 1.f / static_cast<float>(p.per_head ? p.head_dim : static_cast<int>(col.dim));
  float weight[kVecs][kVec], total[kVecs][kVec] = {};
  load_weight(q ? p.weight[0] : p.weight[1], p.head_dim, p.per_head, col, weight);

  const int64_t last = runs.last(blockIdx.x);
  int64_t row = runs.first(blockIdx.x);
  Row<T, W> x, dy;
  x.load(in, row, col);
  dy.load(dout, row, col);
  for (; row < last; ++row) {
    const int token = static_cast<int>(row % p.tokens);
    float v[kVecs][kVec], d[kVecs][kVec], sums[kVecs][2] = {};  // v: x; d: b, then dx; sums: x^2 and g x
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      unpack(x.part[i], v[i]);
      unpack(dy.part[i], d[i]);
      if (token < grid_tokens && col.inside(i)) Rotation(p.rope, token, col.at(i) % p.head_dim).turn(d[i], -1.f);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        sums[i][0] += v[i][j] * v[i][j];
        sums[i][1] += d[i][j] * weight[i][j] * v[i][j];
      }
    }
    if (row + 1 < last) {
      x.load(in, row + 1, col);
      dy.load(dout, row + 1, col);
    }
    group_sums<W>(sums, p.per_head, p.head_dim, scratch[row % 2]);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const float rstd = rsqrtf(sums[i][0] * inv_group + p.eps), mean_gn = sums[i][1] * inv_group * rstd;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float n = v[i][j] * rstd;
        total[i][j] += d[i][j] * n;
        d[i][j] = rstd * (d[i][j] * weight[i][j] - n * mean_gn);
      }
      if (col.inside(i)) store(dx + row * col.dim + col.at(i), d[i]);
    }
  }
  float* partial = p.partial + (blockIdx.y * runs.count + blockIdx.x) * col.dim;  // [2, runs, dim]
#pragma unroll
  for (int i = 0; i < kVecs; ++i)
    if (col.inside(i)) store(partial + col.at(i), total[i]);
}

}  // namespace flg

// RMS norm and rotary embedding of q (blockIdx.y = 0) and k (1), forward and backward. The kernels are bound by memory:
// each row is read once, kept in registers and written once. A vector of eight channels holds four rotary pairs, so a
// rotation moves no data between threads.
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

// The rotations of one row in shared memory: cosine and sine of the channel pairs of a head. All heads share them.
using Rotations = float2[FLG_ROPE_PAIRS];

// Brings the rotations of consecutive rows into shared memory. Thread i serves pair i of a head, so that finding the
// pair's axis, and counting frames, rows and columns, is done once per row and not for every vector of the row.
class Rotor {
 public:
  // Starts at `row`. `table` points at the pair's entry for position 0 of its axis.
  __device__ __forceinline__ Rotor(const flg_rope& rope, int tokens, int64_t row) : tokens_(tokens) {
    int pair = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {  // pairs are ordered frames, rows, columns
      if (table_ == nullptr && pair < rope.pairs[axis]) {
        table_ = reinterpret_cast<const float2*>(rope.factors[axis]) + pair;
        width_ = rope.pairs[axis];
        axis_ = axis;
      }
      pair -= rope.pairs[axis];
    }
    const int plane = rope.size[1] * rope.size[2];
    token_ = static_cast<int>(row % tokens);
    frame_ = token_ / plane, row_ = token_ / rope.size[2] % rope.size[1], column_ = token_ % rope.size[2];
  }

  // Starts to copy this thread's pair for the current row, then goes on to the next row. `copies_done` and a barrier
  // must follow before any thread reads it. Text tokens follow the grid and are not rotated: their cosine is 1.
  __device__ __forceinline__ void stage(Rotations& to, const flg_rope& rope) {
    if (table_ == nullptr) return;  // more threads than pairs
    const int at = axis_ == 0 ? frame_ : axis_ == 1 ? row_ : column_;
    if (frame_ < rope.size[0]) {
      copy_to_shared(&to[threadIdx.x], table_ + at * width_);
    } else {
      to[threadIdx.x] = make_float2(1.f, 0.f);
    }
    if (++column_ == rope.size[2]) column_ = 0, ++row_;
    if (row_ == rope.size[1]) row_ = 0, ++frame_;
    if (++token_ == tokens_) token_ = frame_ = row_ = column_ = 0;  // the next sample
  }

 private:
  const float2* table_ = nullptr;
  int axis_ = 0, width_ = 0;
  int tokens_, token_, frame_ = 0, row_ = 0, column_ = 0;
};

// Rotates the pairs of a thread's vectors by their angles (kDirection 1) or back (-1). `pair` holds the first pair of
// each vector within its head. At the exact widths it is the same for all vectors, see with_rope_width.
template <int kDirection, typename W>
__device__ __forceinline__ void rotate(const Rotations& by, const int (&pair)[kVecs], float (&v)[kVecs][kVec]) {
  float turns[2][4];  // cosine and sine of two pairs, and of two more
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (i == 0 || !W::kExact) {
      load_four(&by[pair[i]].x, turns[0]);
      load_four(&by[pair[i] + 2].x, turns[1]);
    }
#pragma unroll
    for (int j = 0; j < kVec / 2; ++j) {
      const float a = v[i][2 * j], b = v[i][2 * j + 1];
      const float cosine = turns[j / 2][j % 2 * 2], sine = kDirection * turns[j / 2][j % 2 * 2 + 1];
      v[i][2 * j] = a * cosine - b * sine;
      v[i][2 * j + 1] = a * sine + b * cosine;
    }
  }
}

// The first pair, within its head, of each of this thread's vectors.
template <typename W>
__device__ __forceinline__ void find_pairs(const Columns<W>& col, int head_dim, int (&pair)[kVecs]) {
#pragma unroll
  for (int i = 0; i < kVecs; ++i) pair[i] = col.at(i) % head_dim / 2;
}

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

// Replaces each vector's sums by the sums over its norm group: its head (per_head) or the full row. All threads meet at
// one barrier, which the staging of the rotations relies on.
template <typename W, int kCount>
__device__ __forceinline__ void group_sums(float (&sums)[kVecs][kCount], int per_head, int head_dim,
                                           float (&scratch)[kCount][W::kThreads / 32]) {
  if (per_head) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) head_sum(sums[i], head_dim / kVec);
    __syncthreads();
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
  alignas(16) __shared__ Rotations staged[2];  // of even and of odd rows
  const Columns<W> col(p.dim);
  const bool q = blockIdx.y == 0;
  const void* in = q ? p.x[0] : p.x[1];
  T* out = static_cast<T*>(q ? p.out[0] : p.out[1]);
  const float inv_group = 1.f / static_cast<float>(p.per_head ? p.head_dim : static_cast<int>(col.dim));
  int pair[kVecs];
  find_pairs(col, p.head_dim, pair);
  float weight[kVecs][kVec];
  load_weight(q ? p.weight[0] : p.weight[1], p.head_dim, p.per_head, col, weight);

  const int64_t last = runs.last(blockIdx.x);
  int64_t row = runs.first(blockIdx.x);
  Rotor rotor(p.rope, static_cast<int>(p.tokens), row);
  Row<T, W> x;
  x.load(in, row, col);
  rotor.stage(staged[row % 2], p.rope);
  for (; row < last; ++row) {
    const int turn = static_cast<int>(row % 2);  // the barrier of a row separates the uses of its two arrays
    float v[kVecs][kVec], sums[kVecs][1] = {};
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      unpack(x.part[i], v[i]);
#pragma unroll
      for (int j = 0; j < kVec; ++j) sums[i][0] += v[i][j] * v[i][j];
    }
    if (row + 1 < last) x.load(in, row + 1, col);  // load the next row while this one is reduced
    copies_done();
    group_sums<W>(sums, p.per_head, p.head_dim, scratch[turn]);  // two scratch arrays in turn, see block_sum
    if (row + 1 < last) rotor.stage(staged[1 - turn], p.rope);   // the other array was read before the barrier
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const float rstd = rsqrtf(sums[i][0] * inv_group + p.eps);
#pragma unroll
      for (int j = 0; j < kVec; ++j) v[i][j] *= rstd * weight[i][j];
    }
    rotate<1, W>(staged[turn], pair, v);
#pragma unroll
    for (int i = 0; i < kVecs; ++i)
      if (col.inside(i)) store(out + row * col.dim + col.at(i), v[i]);
  }
}

// With n = x rstd, b = dout rotated back and g = weight b: dx = rstd (g - n mean(g n)), dweight = sum n b.
template <typename T, typename W>
__global__ void __launch_bounds__(W::kThreads, kRopeBackwardBlocks<T, W>)
    qk_norm_rope_backward_kernel(const flg_qk_norm_rope_backward_params p, const Runs runs) {
  __shared__ float scratch[2][2][W::kThreads / 32];
  alignas(16) __shared__ Rotations staged[2];  // of even and of odd rows
  const Columns<W> col(p.dim);
  const bool q = blockIdx.y == 0;
  const void* in = q ? p.x[0] : p.x[1];
  const void* dout = q ? p.dout[0] : p.dout[1];
  T* dx = static_cast<T*>(q ? p.dx[0] : p.dx[1]);
  const float inv_group = 1.f / static_cast<float>(p.per_head ? p.head_dim : static_cast<int>(col.dim));
  int pair[kVecs];
  find_pairs(col, p.head_dim, pair);
  float weight[kVecs][kVec], total[kVecs][kVec] = {};
  load_weight(q ? p.weight[0] : p.weight[1], p.head_dim, p.per_head, col, weight);

  const int64_t last = runs.last(blockIdx.x);
  int64_t row = runs.first(blockIdx.x);
  Rotor rotor(p.rope, static_cast<int>(p.tokens), row);
  Row<T, W> x, dy;
  x.load(in, row, col);
  dy.load(dout, row, col);
  rotor.stage(staged[row % 2], p.rope);
  copies_done();
  __syncthreads();
  for (; row < last; ++row) {
    const int turn = static_cast<int>(row % 2);
    // This row's rotations were there before the last barrier, and the other array was read before it too.
    if (row + 1 < last) rotor.stage(staged[1 - turn], p.rope);
    float v[kVecs][kVec], d[kVecs][kVec], sums[kVecs][2] = {};  // v: x; d: b, then dx; sums: x^2 and g x
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      unpack(x.part[i], v[i]);
      unpack(dy.part[i], d[i]);
    }
    rotate<-1, W>(staged[turn], pair, d);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
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
    copies_done();
    group_sums<W>(sums, p.per_head, p.head_dim, scratch[turn]);
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

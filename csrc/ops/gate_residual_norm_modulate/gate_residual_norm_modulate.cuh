// Adds the deferred residual of the previous block, then applies the norm of the next one. The kernels are bound by
// memory: each row is read once, kept in registers and written once. All sums run in a fixed order.
#pragma once

#include <type_traits>

#include "flg/reduce.cuh"
#include "flg/row.cuh"
#include "flg/runs.h"
#include "gate_residual_norm_modulate.h"

namespace flg {

// Blocks per SM that the compiler must leave registers for: 20 warps forward and 12 backward, each of which loads its
// next rows while it works.
template <typename T, typename W>
constexpr int kForwardBlocks = W::kExact && sizeof(T) == 2 ? 640 / W::kThreads : 1;
template <typename T, typename W>
constexpr int kBackwardBlocks = W::kExact && sizeof(T) == 2 ? 384 / W::kThreads : 1;
// Rows that the forward kernel has under way while it works on another. The registers of a residual take a row's place.
template <typename T, typename W, bool kResidual>
constexpr int kForwardAhead = !kResidual && W::kExact && sizeof(T) == 2 ? 2 : 1;
// The backward kernel loads the next rows ahead only where they fit in registers. They do not with idle threads, in
// float32, or on GPUs other than Hopper, where ptxas is a few registers short.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr bool kHopper = false;
#else
constexpr bool kHopper = true;
#endif
template <typename T, typename W>
constexpr bool kPrefetchBackward = kHopper && W::kExact && sizeof(T) == 2;

// v = row + offset for this thread's columns; a null `row` counts as zeros.
template <typename W>
__device__ __forceinline__ void load_table(const float* row, float offset, const Columns<W>& col,
                                           float (&v)[kVecs][kVec]) {
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[i][j] = 0.f;
    if (row != nullptr && col.inside(i)) load_shared_row(row + col.at(i), v[i]);
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[i][j] += offset;
  }
}

// Vector i of row + offset: from registers if kKept, else loaded again (from L1), which frees registers.
template <bool kKept, typename W>
__device__ __forceinline__ void pick(const float (&kept)[kVecs][kVec], const float* row, float offset,
                                     const Columns<W>& col, int i, float (&v)[kVec]) {
#pragma unroll
  for (int j = 0; j < kVec; ++j) v[j] = kKept ? kept[i][j] : 0.f;
  if constexpr (!kKept) {
    if (row != nullptr && col.inside(i)) load_shared_row(reread(row) + col.at(i), v);
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[j] += offset;
  }
}

// One block handles one run of rows. kResidual: y is given, so x' = x + gate y is computed and stored.
template <typename T, typename W, bool kResidual>
__global__ void __launch_bounds__(W::kThreads, kForwardBlocks<T, W>)
    forward_kernel(const flg_gate_residual_norm_modulate_params p, const Runs runs) {
  __shared__ float scratch[2][1][W::kThreads / 32];
  const Columns<W> col(p.dim);
  const float inv_dim = 1.f / static_cast<float>(col.dim);
  const int64_t run = blockIdx.x, mod = runs.mod(run), last = runs.last(run);
  int64_t row = runs.first(run);

  const float *scale_row = p.scale ? p.scale + mod * p.scale_stride : nullptr,
              *shift_row = p.shift ? p.shift + mod * p.shift_stride : nullptr,
              *gate_row = p.gate ? p.gate + mod * p.gate_stride : nullptr;
  const float gate_offset = p.gate ? 0.f : 1.f;  // without a gate: x' = x + 1 y
  float gain[kVecs][kVec], shift[kVecs][kVec], gate[kVecs][kVec];
  load_table(scale_row, p.offset, col, gain);
  load_table(shift_row, 0.f, col, shift);
  if constexpr (kResidual) load_table(gate_row, gate_offset, col, gate);

  constexpr int kAhead = kForwardAhead<T, W, kResidual>;
  Row<T, W> x[kAhead], y[kAhead];
  auto load = [&](int which, int64_t r) {
    x[which].load(p.x, r, col);
    if constexpr (kResidual) y[which].load(p.y, r, col);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (row + i < last) load(i, row + i);
  while (row < last) {
#pragma unroll
    for (int turn = 0; turn < kAhead; ++turn) {
      if (row == last) break;
      float v[kVecs][kVec], sum = 0.f, squares = 0.f;
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        unpack(x[turn].part[i], v[i]);
        if constexpr (kResidual) {
          float b[kVec];
          unpack(y[turn].part[i], b);
          // The norm must see the rounded x', because the backward pass computes its mean and rstd from the stored x'.
#pragma unroll
          for (int j = 0; j < kVec; ++j) v[i][j] = rounded<T>(v[i][j] + gate[i][j] * b[j]);
          if (col.inside(i)) store(static_cast<T*>(p.x_out) + row * col.dim + col.at(i), v[i]);
        }
      }
      if (row + kAhead < last) load(turn, row + kAhead);  // in flight while this row is reduced

      // First the mean, then the centred squares: with the large means of the residual stream, E[x^2] - E[x]^2 would
      // lose digits.
#pragma unroll
      for (int i = 0; i < kVecs; ++i)
#pragma unroll
        for (int j = 0; j < kVec; ++j) sum += v[i][j];
      const float mean = block_sum<W::kThreads>(sum, scratch[0]) * inv_dim;
#pragma unroll
      for (int i = 0; i < kVecs; ++i)
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          v[i][j] = col.inside(i) ? v[i][j] - mean : 0.f;  // columns outside the row add nothing to the squares
          squares += v[i][j] * v[i][j];
        }
      const float rstd = rsqrtf(block_sum<W::kThreads>(squares, scratch[1]) * inv_dim + p.eps);
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        float out[kVec];
#pragma unroll
        for (int j = 0; j < kVec; ++j) out[j] = v[i][j] * rstd * gain[i][j] + shift[i][j];
        if (col.inside(i)) store(static_cast<T*>(p.h) + row * col.dim + col.at(i), out);
      }
      ++row;
    }
  }
}

// With n = (x' - mean) rstd, gain = offset + scale and g = dh gain:
// dx = dx' + rstd (g - mean(g) - n mean(g n)), dy = gate dx, dscale = sum dh n, dshift = sum dh, dgate = sum dx y.
// Mean and rstd are computed again, because x' is read anyway and storing them would cost more memory traffic.
template <typename T, typename W, bool kGate>
__global__ void __launch_bounds__(W::kThreads, kBackwardBlocks<T, W>)
    backward_kernel(const flg_gate_residual_norm_modulate_backward_params p, const Runs runs) {
  constexpr bool kPrefetch = kPrefetchBackward<T, W>;
  constexpr bool kKeepGain = kPrefetch && !(kGate && std::is_same_v<T, __half>);  // float16 with a gate would spill
  constexpr int kKinds = kGate ? 3 : 2;                                           // sums per column
  // Float16 with a gate also loads y late where dx' and y are not loaded ahead: sm_100 lacked one register.
  constexpr bool kLateY = !kPrefetch && kGate && std::is_same_v<T, __half>;
  __shared__ float scratch[2][2][W::kThreads / 32];
  const Columns<W> col(p.dim);
  const float inv_dim = 1.f / static_cast<float>(col.dim);

  for (int64_t run = blockIdx.x; run < runs.count; run += gridDim.x) {
    const int64_t mod = runs.mod(run), last = runs.last(run);
    const float* scale = p.scale ? p.scale + mod * p.scale_stride : nullptr;
    const float* gate = kGate ? p.gate + mod * p.gate_stride : nullptr;
    float kept_gain[kVecs][kVec], total[kKinds][kVecs][kVec] = {};  // total: sums of dscale, dshift, dgate
    if constexpr (kKeepGain) load_table(scale, p.offset, col, kept_gain);

    int64_t row = runs.first(run);
    Row<T, W> x, dh, dx_out, y;
    auto load_first = [&](int64_t r) { x.load(p.x_out, r, col), dh.load(p.dh, r, col); };
    auto load_second = [&] {
      if (p.dx_out) dx_out.load(p.dx_out, row, col);
      if constexpr (kGate && !kLateY) y.load(p.y, row, col);
    };
    if constexpr (kPrefetch) load_first(row);
    for (; row < last; ++row) {
      // Loads overlap the sums: dx' and y of this row start here, x' and dh of the next row before the first sum.
      if constexpr (kPrefetch) load_second();
      if constexpr (!kPrefetch) load_first(row);
      float v[kVecs][kVec], d[kVecs][kVec], sums[2] = {0.f, 0.f};  // v: x', later x' - mean; d: dh
      auto load_g = [&](int i, float (&g)[kVec]) {
        pick<kKeepGain>(kept_gain, scale, p.offset, col, i, g);
#pragma unroll
        for (int j = 0; j < kVec; ++j) g[j] *= d[i][j];
      };
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        float g[kVec];
        unpack(x.part[i], v[i]);
        unpack(dh.part[i], d[i]);
        load_g(i, g);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          total[1][i][j] += d[i][j];
          sums[0] += v[i][j];
          sums[1] += g[j];
        }
      }
      if (kPrefetch && row + 1 < last) load_first(row + 1);

      // First sum: the means of x' and g.
      block_sum<W::kThreads>(sums, scratch[0]);
      const float mean = sums[0] * inv_dim, mean_g = sums[1] * inv_dim;
      sums[0] = sums[1] = 0.f;
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        float g[kVec];
        load_g(i, g);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          v[i][j] = col.inside(i) ? v[i][j] - mean : 0.f;
          sums[0] += v[i][j] * v[i][j];
          sums[1] += g[j] * v[i][j];
        }
      }
      // Second sum: the variance of x', and mean(g n) before its factor rstd.
      block_sum<W::kThreads>(sums, scratch[1]);
      const float rstd = rsqrtf(sums[0] * inv_dim + p.eps), mean_gn = sums[1] * inv_dim * rstd;

      if constexpr (!kPrefetch) load_second();
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        float g[kVec], dx[kVec], other[kVec] = {}, b[kVec], by[kVec] = {};
        load_g(i, g);
        if (p.dx_out) unpack(dx_out.part[i], other);
        if constexpr (kGate) {
          if constexpr (kLateY) y.load_part(i, p.y, row, col);
          unpack(y.part[i], b);
          // The gate is loaded again from L1 for every row: registers that hold it would spill.
          if (col.inside(i)) load_shared_row(reread(gate) + col.at(i), by);
        }
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          const float n = v[i][j] * rstd;
          total[0][i][j] += d[i][j] * n;
          dx[j] = other[j] + rstd * (g[j] - mean_g - n * mean_gn);
          if constexpr (kGate) {
            total[2][i][j] += dx[j] * b[j];
            b[j] = dx[j] * by[j];
          }
        }
        if (col.inside(i)) {
          store(static_cast<T*>(p.dx) + row * col.dim + col.at(i), dx);
          if constexpr (kGate) store(static_cast<T*>(p.dy) + row * col.dim + col.at(i), b);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kKinds; ++k)
#pragma unroll
      for (int i = 0; i < kVecs; ++i)
        if (col.inside(i)) store(p.partial + (run * kKinds + k) * col.dim + col.at(i), total[k][i]);
  }
}

}  // namespace flg

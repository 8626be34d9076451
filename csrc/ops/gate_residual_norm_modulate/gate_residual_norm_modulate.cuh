// The deferred residual of the block that ran last, then the norm of the one that runs now. Bound by memory: each row
// is read once, written once, and waits in registers meanwhile. All sums run in a fixed order.
#pragma once

#include <type_traits>

#include "flg/reduce.cuh"
#include "flg/row.cuh"
#include "flg/runs.h"
#include "gate_residual_norm_modulate.h"

namespace flg {

// Blocks per SM asked of the compiler: about 20 warps forward and 12 backward, each with its next rows in flight.
template <typename T, typename W>
constexpr int kForwardBlocks = W::kExact && sizeof(T) == 2 ? 640 / W::kThreads : 1;
template <typename T, typename W>
constexpr int kForkBlocks = kForwardBlocks<T, W> > 1 ? 480 / W::kThreads : 1;  // forward, with five tables
template <typename T, typename W>
constexpr int kBackwardBlocks = W::kExact && sizeof(T) == 2 ? 384 / W::kThreads : 1;
// Without room for the next rows in registers they are read when they are needed: with idle lanes, in float32, and on
// other GPUs than Hopper, where ptxas lacks a few registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr bool kHopper = false;
#else
constexpr bool kHopper = true;
#endif
template <typename T, typename W>
constexpr bool kPrefetchBackward = kHopper && W::kExact && sizeof(T) == 2;

template <typename W>
__device__ __forceinline__ void load_table(const float* row, float offset, const Columns<W>& col,
                                           float (&v)[kVecs][kVec]) {
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[i][j] = 0.f;
    if (row != nullptr && col.there(i)) load_shared_row(row + col.at(i), v[i]);
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[i][j] += offset;
  }
}

// Vector i of a table's row: from registers, or where they are needed for other things from L1 once more.
template <bool kKept, typename W>
__device__ __forceinline__ void pick(const float (&kept)[kVecs][kVec], const float* row, float offset,
                                     const Columns<W>& col, int i, float (&v)[kVec]) {
#pragma unroll
  for (int j = 0; j < kVec; ++j) v[j] = kKept ? kept[i][j] : 0.f;
  if constexpr (!kKept) {
    if (row != nullptr && col.there(i)) load_shared_row(reread(row) + col.at(i), v);
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[j] += offset;
  }
}

template <typename T, typename W, bool kResidual, bool kFork>
__global__ void __launch_bounds__(W::kThreads, kFork ? kForkBlocks<T, W> : kForwardBlocks<T, W>)
    forward_kernel(const flg_gate_residual_norm_modulate_params p, const Runs runs) {
  __shared__ float scratch[2][1][W::kThreads / 32];
  const Columns<W> col(p.dim);
  const float inv_dim = 1.f / static_cast<float>(col.dim);
  const int64_t run = blockIdx.x, mod = runs.mod(run), last = runs.last(run);
  int64_t row = runs.first(run);

  const float *scale_row = p.scale ? p.scale + mod * p.scale_stride : nullptr,
              *shift_row = p.shift ? p.shift + mod * p.shift_stride : nullptr,
              *gate_row = p.gate ? p.gate + mod * p.gate_stride : nullptr;
  const float gate_offset = p.gate ? 0.f : 1.f;
  float gain[kVecs][kVec], shift[kVecs][kVec], gate[kVecs][kVec];
  if constexpr (!kFork) {  // a fork has five tables, and registers for none
    load_table(scale_row, p.offset, col, gain);
    load_table(shift_row, 0.f, col, shift);
    if constexpr (kResidual) load_table(gate_row, gate_offset, col, gate);
  }

  Row<T, W> x, y;
  x.load(p.x, row, col);
  if constexpr (kResidual) y.load(p.y, row, col);
  for (; row < last; ++row) {
    float v[kVecs][kVec], sum = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      unpack(x.part[i], v[i]);
      if constexpr (kResidual) {
        float b[kVec], g[kVec];
        unpack(y.part[i], b);
        pick<!kFork>(gate, gate_row, gate_offset, col, i, g);
#pragma unroll
        for (int j = 0; j < kVec; ++j) v[i][j] = rounded<T>(v[i][j] + g[j] * b[j]);
        if (col.there(i)) store(static_cast<T*>(p.x_out) + row * col.dim + col.at(i), v[i]);
      }
    }
    if (row + 1 < last) {  // the next row travels while this one is reduced
      x.load(p.x, row + 1, col);
      if constexpr (kResidual) y.load(p.y, row + 1, col);
    }

    // Mean, then the centred squares: the residual stream has means that E[x^2] - E[x]^2 would lose digits to.
#pragma unroll
    for (int i = 0; i < kVecs; ++i)
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum += v[i][j];
    const float mean = block_sum<W::kThreads>(sum, scratch[0]) * inv_dim;
#pragma unroll
    for (int i = 0; i < kVecs; ++i)
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        v[i][j] = col.there(i) ? v[i][j] - mean : 0.f;
        squares += v[i][j] * v[i][j];
      }
    const float rstd = rsqrtf(block_sum<W::kThreads>(squares, scratch[1]) * inv_dim + p.eps);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) v[i][j] *= rstd;
      float t[kVec], out[kVec];  // shift, gain and then h
      if constexpr (kFork) {
        pick<false>(gain, p.scale2 + mod * p.scale2_stride, p.offset, col, i, out);
        pick<false>(gain, p.shift2 + mod * p.shift2_stride, 0.f, col, i, t);
#pragma unroll
        for (int j = 0; j < kVec; ++j) out[j] = v[i][j] * out[j] + t[j];
        if (col.there(i)) store(static_cast<T*>(p.h2) + row * col.dim + col.at(i), out);
      }
      pick<!kFork>(gain, scale_row, p.offset, col, i, out);
      pick<!kFork>(shift, shift_row, 0.f, col, i, t);
#pragma unroll
      for (int j = 0; j < kVec; ++j) out[j] = v[i][j] * out[j] + t[j];
      if (col.there(i)) store(static_cast<T*>(p.h) + row * col.dim + col.at(i), out);
    }
  }
}

// The sums of a fork's tables lie in shared memory, each thread's own column there: registers would hold three kinds.
constexpr int kForkSums = 5;  // dscale, dshift, dscale2, dshift2, dgate
template <typename W>
constexpr size_t kForkBytes = sizeof(float) * kForkSums * kVecs * kVec * W::kThreads;

// Adds v to vector i of kind k, and leaves the sum in both.
template <typename W>
__device__ __forceinline__ void add_to(float4* sums, int k, int i, float (&v)[kVec]) {
#pragma unroll
  for (int half = 0; half < kVec / 4; ++half) {
    float4& at = sums[((k * kVecs + i) * (kVec / 4) + half) * W::kThreads + static_cast<int>(threadIdx.x)];
    float* w = v + 4 * half;
    w[0] += at.x, w[1] += at.y, w[2] += at.z, w[3] += at.w;
    at = make_float4(w[0], w[1], w[2], w[3]);
  }
}

// With n = (x' - mean) rstd and g = dh gain: dx = dx' + rstd (g - mean(g) - n mean(g n)), dy = gate dx,
// dscale = sum dh n, dshift = sum dh, dgate = sum dx y. The statistics are taken again: x' is here anyway. With two
// successors g = dh gain + dh2 gain2: what comes back through both norms is one gradient of their common n.
template <typename T, typename W, bool kGate, bool kFork>
__global__ void __launch_bounds__(W::kThreads, kBackwardBlocks<T, W>)
    backward_kernel(const flg_gate_residual_norm_modulate_backward_params p, const Runs runs) {
  constexpr bool kPrefetch = kPrefetchBackward<T, W> && !kFork;
  constexpr bool kKeepGain = kPrefetch && !(kGate && std::is_same_v<T, __half>);  // would spill there
  constexpr bool kSecondFirst = kPrefetch || (kFork && kPrefetchBackward<T, W>);
  constexpr int kKinds = kGate ? 3 : 2;
  __shared__ float scratch[2][2][W::kThreads / 32];
  FLG_EXTERN_SHARED(float4, fork_sums);
  const Columns<W> col(p.dim);
  const float inv_dim = 1.f / static_cast<float>(col.dim);

  for (int64_t run = blockIdx.x; run < runs.count; run += gridDim.x) {
    const int64_t mod = runs.mod(run), last = runs.last(run);
    const float* scale = p.scale ? p.scale + mod * p.scale_stride : nullptr;
    const float* gate = kGate ? p.gate + mod * p.gate_stride : nullptr;
    const float* scale2 = kFork ? p.scale2 + mod * p.scale2_stride : nullptr;
    float kept_gain[kVecs][kVec], total[kKinds][kVecs][kVec] = {};
    if constexpr (kKeepGain) load_table(scale, p.offset, col, kept_gain);

    int64_t row = runs.first(run);
    Row<T, W> x, dh, dh2, dx_out, y;
    auto load_first = [&](int64_t r) {
      x.load(p.x_out, r, col), dh.load(p.dh, r, col);
      if constexpr (kFork) dh2.load(p.dh2, r, col);
    };
    auto load_second = [&](int i) {
      if (p.dx_out) dx_out.load(p.dx_out, row, col, i);
      if constexpr (kGate) y.load(p.y, row, col, i);
    };
    auto load_all_second = [&] {
      if (p.dx_out) dx_out.load(p.dx_out, row, col);
      if constexpr (kGate) y.load(p.y, row, col);
    };
    if constexpr (kFork) {
#pragma unroll
      for (int k = 0; k < kForkSums * kVecs * kVec / 4; ++k)
        fork_sums[k * W::kThreads + static_cast<int>(threadIdx.x)] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
    if constexpr (kPrefetch) load_first(row);
    for (; row < last; ++row) {
      // What is needed last travels during the sums of this row; the next x' and dh from its first sum on.
      if constexpr (kSecondFirst) load_all_second();
      if constexpr (!kPrefetch) load_first(row);
      float v[kVecs][kVec], wide[kVecs][kVec], sums[2] = {0.f, 0.f};
      auto dh_and_g = [&](int i, float (&d)[kVec], float (&g)[kVec]) {
        pick<kKeepGain>(kept_gain, scale, p.offset, col, i, g);
        if constexpr (kFork) unpack(dh.part[i], d);  // as it came: half the registers
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          if constexpr (!kFork) d[j] = wide[i][j];
          g[j] *= d[j];
        }
        if constexpr (kFork) {
          float d2[kVec], gain2[kVec];
          unpack(dh2.part[i], d2);
          pick<false>(kept_gain, scale2, p.offset, col, i, gain2);
#pragma unroll
          for (int j = 0; j < kVec; ++j) g[j] += d2[j] * gain2[j];
        }
      };
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        float d[kVec], g[kVec];
        unpack(x.part[i], v[i]);
        if constexpr (!kFork) unpack(dh.part[i], wide[i]);
        dh_and_g(i, d, g);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          if constexpr (!kFork) total[1][i][j] += d[j];
          sums[0] += v[i][j];
          sums[1] += g[j];
        }
      }
      if (kPrefetch && row + 1 < last) load_first(row + 1);

      block_sum<W::kThreads>(sums, scratch[0]);
      const float mean = sums[0] * inv_dim, mean_g = sums[1] * inv_dim;
      sums[0] = sums[1] = 0.f;
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        float d[kVec], g[kVec];
        dh_and_g(i, d, g);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          v[i][j] = col.there(i) ? v[i][j] - mean : 0.f;
          sums[0] += v[i][j] * v[i][j];
          sums[1] += g[j] * v[i][j];
        }
      }
      block_sum<W::kThreads>(sums, scratch[1]);
      const float rstd = rsqrtf(sums[0] * inv_dim + p.eps), mean_gn = sums[1] * inv_dim * rstd;

      if constexpr (!kSecondFirst && !kFork) load_all_second();
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        float d[kVec], g[kVec], other[kVec] = {}, b[kVec], by[kVec] = {};
        dh_and_g(i, d, g);
        if constexpr (kFork) {
          float sum[kVec];
#pragma unroll
          for (int k = 0; k < kForkSums - 1; ++k) {
            unpack(k < 2 ? dh.part[i] : dh2.part[i], sum);
#pragma unroll
            for (int j = 0; j < kVec; ++j) sum[j] *= k % 2 ? 1.f : v[i][j] * rstd;
            add_to<W>(fork_sums, k, i, sum);
          }
        }
        if constexpr (!kSecondFirst && kFork) load_second(i);
        if (p.dx_out) unpack(dx_out.part[i], other);
        if constexpr (kGate) {
          unpack(y.part[i], b);
          if (col.there(i)) load_shared_row(reread(gate) + col.at(i), by);  // from L1: kept in registers it would spill
        }
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          const float n = v[i][j] * rstd;
          if constexpr (!kFork) total[0][i][j] += d[j] * n;
          d[j] = other[j] + rstd * (g[j] - mean_g - n * mean_gn);
          if constexpr (kGate) {
            if constexpr (!kFork) total[2][i][j] += d[j] * b[j];
            if constexpr (kFork) g[j] = d[j] * b[j];
            b[j] = d[j] * by[j];
          }
        }
        if constexpr (kFork) add_to<W>(fork_sums, kForkSums - 1, i, g);
        if (col.there(i)) {
          store(static_cast<T*>(p.dx) + row * col.dim + col.at(i), d);
          if constexpr (kGate) store(static_cast<T*>(p.dy) + row * col.dim + col.at(i), b);
        }
      }
    }
    constexpr int kAll = kFork ? kForkSums : kKinds;
#pragma unroll
    for (int k = 0; k < kAll; ++k)
#pragma unroll
      for (int i = 0; i < kVecs; ++i)
        if (col.there(i)) {
          float sum[kVec] = {};
          if constexpr (kFork) add_to<W>(fork_sums, k, i, sum);
          store(p.partial + (run * kAll + k) * col.dim + col.at(i), kFork ? sum : total[k % kKinds][i]);
        }
  }
}

}  // namespace flg

// The backward pass of norm_modulate. It moves the least memory per barrier of all the kernels here, so on Hopper two
// rows pass each barrier together: half the waits, and two independent chains of arithmetic in between.
#pragma once

#include "gate_residual_norm_modulate.cuh"

namespace flg {

// With n = (x - mean) rstd, gain = offset + scale and g = dh gain:
// dx = rstd (g - mean(g) - n mean(g n)), dscale = sum dh n, dshift = sum dh.
template <typename T, typename W>
__global__ void __launch_bounds__(W::kThreads, kBackwardBlocks<T, W>)
    norm_backward_kernel(const flg_gate_residual_norm_modulate_backward_params p, const Runs runs) {
  constexpr bool kPrefetch = kPrefetchBackward<T, W>;
  constexpr int kRows = kPrefetch ? 2 : 1;
  __shared__ float scratch[2][2 * kRows][W::kThreads / 32];
  const Columns<W> col(p.dim);
  const float inv_dim = 1.f / static_cast<float>(col.dim);

  for (int64_t run = blockIdx.x; run < runs.count; run += gridDim.x) {
    const int64_t mod = runs.mod(run), last = runs.last(run);
    float gain[kVecs][kVec], dscale[kVecs][kVec] = {}, dshift[kVecs][kVec] = {};
    load_table(p.scale ? p.scale + mod * p.scale_stride : nullptr, p.offset, col, gain);

    int64_t row = runs.first(run);
    Row<T, W> x[kRows], dh[kRows];
    auto load_rows = [&](int64_t first) {  // zeros for a row after the last one
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        x[r].load(p.x_out, first + r, col, first + r < last);
        dh[r].load(p.dh, first + r, col, first + r < last);
      }
    };
    if constexpr (kPrefetch) load_rows(row);
    for (; row < last; row += kRows) {
      if constexpr (!kPrefetch) load_rows(row);
      // v: x, later x - mean; sums: two of each row. dh stays packed, because twice 16 more floats would spill.
      float v[kRows][kVecs][kVec], sums[2 * kRows] = {}, mean_g[kRows];
      Packed<T> packed[kRows][kVecs];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int i = 0; i < kVecs; ++i) {
          float d[kVec];
          packed[r][i] = dh[r].part[i];
          unpack(x[r].part[i], v[r][i]);
          unpack(packed[r][i], d);
#pragma unroll
          for (int j = 0; j < kVec; ++j) {
            dshift[i][j] += d[j];
            sums[2 * r] += v[r][i][j];
            sums[2 * r + 1] += d[j] * gain[i][j];
          }
        }
      if (kPrefetch && row + kRows < last) load_rows(row + kRows);

      // First sums: the means of x and g.
      block_sum<W::kThreads>(sums, scratch[0]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float mean = sums[2 * r] * inv_dim;
        mean_g[r] = sums[2 * r + 1] * inv_dim;
        sums[2 * r] = sums[2 * r + 1] = 0.f;
#pragma unroll
        for (int i = 0; i < kVecs; ++i) {
          float d[kVec];
          unpack(again(packed[r][i]), d);
#pragma unroll
          for (int j = 0; j < kVec; ++j) {
            v[r][i][j] = col.inside(i) ? v[r][i][j] - mean : 0.f;
            sums[2 * r] += v[r][i][j] * v[r][i][j];
            sums[2 * r + 1] += d[j] * gain[i][j] * v[r][i][j];
          }
        }
      }

      // Second sums: the variance of x, and mean(g n) before its factor rstd.
      block_sum<W::kThreads>(sums, scratch[1]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r > 0 && row + r >= last) break;  // the zeros of an absent row: with eps = 0 their rstd is infinite
        const float rstd = rsqrtf(sums[2 * r] * inv_dim + p.eps), mean_gn = sums[2 * r + 1] * inv_dim * rstd;
#pragma unroll
        for (int i = 0; i < kVecs; ++i) {
          float d[kVec], dx[kVec];
          unpack(again(packed[r][i]), d);
#pragma unroll
          for (int j = 0; j < kVec; ++j) {
            const float n = v[r][i][j] * rstd;
            dscale[i][j] += d[j] * n;
            dx[j] = rstd * (d[j] * gain[i][j] - mean_g[r] - n * mean_gn);
          }
          if (col.inside(i)) store(static_cast<T*>(p.dx) + (row + r) * col.dim + col.at(i), dx);
        }
      }
    }
    float* partial = p.partial + run * 2 * col.dim;  // [runs, 2, dim]
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      if (!col.inside(i)) continue;
      store(partial + col.at(i), dscale[i]);
      store(partial + col.dim + col.at(i), dshift[i]);
    }
  }
}

}  // namespace flg

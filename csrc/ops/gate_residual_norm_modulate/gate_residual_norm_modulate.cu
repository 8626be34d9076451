#include <algorithm>

#include "flg/check.h"
#include "flg/column_sum.cuh"
#include "flg/launch.h"
#include "norm_backward.cuh"

namespace flg {
namespace {

using Forward = flg_gate_residual_norm_modulate_params;
using Backward = flg_gate_residual_norm_modulate_backward_params;

// Runs per resident block. With several short runs the hardware balances the load: a slow SM gets fewer of them.
constexpr int64_t kForwardRuns = 4;

template <typename T, typename W>
cudaError_t forward(W, const Forward& p, int64_t sms, void* stream) {
  const Runs runs = split_rows(p.rows, p.rows_per_mod, sms * kForwardBlocks<T, W> * kForwardRuns);
  const auto kernel = p.y ? forward_kernel<T, W, true> : forward_kernel<T, W, false>;
  return launch(kernel, dim3(static_cast<unsigned>(runs.count)), W::kThreads, stream, false, p, runs);
}

template <typename T, typename W>
Runs backward_runs(int64_t rows, int64_t rows_per_mod, int64_t sms) {
  return split_rows(rows, rows_per_mod, sms * kBackwardBlocks<T, W>);
}

template <typename T, typename W>
cudaError_t backward(W, const Backward& p, int64_t sms, void* stream) {
  const Runs runs = backward_runs<T, W>(p.rows, p.rows_per_mod, sms);
  const int64_t blocks = std::min(runs.count, sms * kBackwardBlocks<T, W>);
  const int64_t width = (p.gate ? 3 : 2) * p.dim;  // dscale, dshift and, with a gate, dgate side by side
  const auto kernel = p.gate     ? backward_kernel<T, W, true>
                      : p.dx_out ? backward_kernel<T, W, false>
                                 : norm_backward_kernel<T, W>;
  const dim3 grid(static_cast<unsigned>(blocks));
  const cudaError_t err = launch(kernel, grid, W::kThreads, stream, false, p, runs);
  if (err != cudaSuccess || p.partial == p.sums) return err;  // one run per modulation row: the sums are complete
  return column_sums(p.sums, p.partial, p.rows / p.rows_per_mod, runs.per_mod, width, stream);
}

bool valid_sizes(int64_t rows, int64_t dim, int64_t rows_per_mod) {
  return rows >= 0 && dim > 0 && dim % kVec == 0 && dim <= kWidest && rows_per_mod > 0 && rows % rows_per_mod == 0 &&
         rows <= INT32_MAX;
}

// Every row of a float32 table must start on a 16-byte boundary.
bool valid_table(const float* p, int64_t stride) { return aligned(p) && stride % 4 == 0; }

}  // namespace
}  // namespace flg

extern "C" int flg_gate_residual_norm_modulate(const flg_gate_residual_norm_modulate_params* params, void* stream) {
  const auto& p = *params;
  FLG_REQUIRE(flg::valid_sizes(p.rows, p.dim, p.rows_per_mod));
  FLG_REQUIRE(flg::aligned(p.x_out) && flg::aligned(p.h) && flg::aligned(p.x) && flg::aligned(p.y));
  FLG_REQUIRE(flg::valid_table(p.gate, p.gate_stride) && flg::valid_table(p.scale, p.scale_stride));
  FLG_REQUIRE(flg::valid_table(p.shift, p.shift_stride));
  if (p.rows == 0) return 0;
  const flg::DeviceGuard guard(p.device);
  FLG_TRY(guard.status);
  int64_t sms = 0;
  FLG_TRY(flg::count_sms(p.device, sms));
  return flg::with_type(p.dtype, [&](auto t) {
    return flg::with_width(p.dim, [&](auto w) { return flg::forward<decltype(t)>(w, p, sms, stream); });
  });
}

extern "C" int64_t flg_gate_residual_norm_modulate_runs(int64_t rows, int64_t dim, int64_t rows_per_mod, int dtype,
                                                        int device) {
  if (!flg::valid_sizes(rows, dim, rows_per_mod)) return -static_cast<int64_t>(cudaErrorInvalidValue);
  if (rows == 0) return 0;
  int64_t sms = 0, runs = 0;
  const cudaError_t err = flg::count_sms(device, sms);
  if (err != cudaSuccess) return -static_cast<int64_t>(err);
  const int bad = flg::with_type(dtype, [&](auto t) {
    return flg::with_width(dim, [&](auto w) {
      runs = flg::backward_runs<decltype(t), decltype(w)>(rows, rows_per_mod, sms).count;
      return cudaSuccess;
    });
  });
  return bad ? -static_cast<int64_t>(bad) : runs;
}

extern "C" int flg_gate_residual_norm_modulate_backward(const flg_gate_residual_norm_modulate_backward_params* params,
                                                        void* stream) {
  const auto& p = *params;
  FLG_REQUIRE(flg::valid_sizes(p.rows, p.dim, p.rows_per_mod));
  FLG_REQUIRE(flg::aligned(p.dx) && flg::aligned(p.dy) && flg::aligned(p.dh) && flg::aligned(p.dx_out));
  FLG_REQUIRE(flg::aligned(p.x_out) && flg::aligned(p.y) && flg::aligned(p.sums) && flg::aligned(p.partial));
  FLG_REQUIRE(flg::valid_table(p.gate, p.gate_stride) && flg::valid_table(p.scale, p.scale_stride));
  FLG_REQUIRE((p.gate == nullptr) == (p.y == nullptr));
  if (p.rows == 0) return 0;
  const flg::DeviceGuard guard(p.device);
  FLG_TRY(guard.status);
  int64_t sms = 0;
  FLG_TRY(flg::count_sms(p.device, sms));
  return flg::with_type(p.dtype, [&](auto t) {
    return flg::with_width(p.dim, [&](auto w) { return flg::backward<decltype(t)>(w, p, sms, stream); });
  });
}

#include "flg/column_sum.cuh"
#include "flg/launch.h"
#include "qk_norm_rope.cuh"

namespace flg {
namespace {

constexpr int64_t kForwardRuns = 4;  // runs per resident block, as in gate_residual_norm_modulate.cu

template <typename T, typename W>
cudaError_t forward(W, const flg_qk_norm_rope_params& p, int64_t sms, void* stream) {
  const Runs runs = split_rows(p.rows, p.rows, sms * kRopeForwardBlocks<T, W> * kForwardRuns);
  const dim3 grid(static_cast<unsigned>(runs.count), 2);
  return launch(qk_norm_rope_kernel<T, W>, grid, W::kThreads, stream, false, p, runs);
}

template <typename T, typename W>
Runs backward_runs(int64_t rows, int64_t sms) {
  return split_rows(rows, rows, ceil_div(sms * kRopeBackwardBlocks<T, W>, 2));  // half of the blocks for q, half for k
}

template <typename T, typename W>
cudaError_t backward(W, const flg_qk_norm_rope_backward_params& p, int64_t sms, void* stream) {
  const Runs runs = backward_runs<T, W>(p.rows, sms);
  const dim3 grid(static_cast<unsigned>(runs.count), 2);
  const auto err = launch(qk_norm_rope_backward_kernel<T, W>, grid, W::kThreads, stream, false, p, runs);
  return err != cudaSuccess ? err : column_sums(p.sums, p.partial, 2, runs.count, p.dim, stream);
}

// Calls f with the Width for these rows. The exact widths let all vectors of a thread use the same rotations, so there
// the threads must cover full heads. They do with heads of 128 channels, as in all released networks.
template <typename F>
int with_rope_width(int64_t dim, int head_dim, F f) {
  return with_width(dim, [&](auto w) {
    using W = decltype(w);
    return W::kExact && W::kThreads * kVec % head_dim ? f(Width<320, false>{}) : f(w);
  });
}

template <typename P>
bool valid(const P& p) {
  const auto& rope = p.rope;
  const int64_t on_grid = int64_t{rope.size[0]} * rope.size[1] * rope.size[2];
  const int64_t lanes = p.head_dim / kVec;
  bool good = p.rows >= 0 && p.rows <= INT32_MAX && p.dim > 0 && p.dim <= kWidest && p.tokens > 0;
  good = good && p.head_dim > 0 && p.head_dim <= 2 * FLG_ROPE_PAIRS && p.head_dim % kVec == 0 &&
         p.dim % p.head_dim == 0 && p.rows % p.tokens == 0;
  // A norm per head sums over `lanes` lanes of a warp by halving, so their number must be a power of two.
  good = good && (!p.per_head || (lanes <= 32 && (lanes & (lanes - 1)) == 0));
  good =
      good && on_grid > 0 && on_grid <= p.tokens && 2 * (rope.pairs[0] + rope.pairs[1] + rope.pairs[2]) == p.head_dim;
  for (int i = 0; i < 2; ++i) good = good && aligned(p.x[i]) && aligned(p.weight[i]);
  return good;
}

}  // namespace
}  // namespace flg

extern "C" int flg_qk_norm_rope(const flg_qk_norm_rope_params* params, void* stream) {
  const auto& p = *params;
  FLG_REQUIRE(flg::valid(p) && flg::aligned(p.out[0]) && flg::aligned(p.out[1]));
  if (p.rows == 0) return 0;
  const flg::DeviceGuard guard(p.device);
  FLG_TRY(guard.status);
  int64_t sms = 0;
  FLG_TRY(flg::count_sms(p.device, sms));
  return flg::with_type(p.dtype, [&](auto t) {
    return flg::with_rope_width(p.dim, p.head_dim,
                                [&](auto w) { return flg::forward<decltype(t)>(w, p, sms, stream); });
  });
}

extern "C" int64_t flg_qk_norm_rope_runs(int64_t rows, int64_t dim, int head_dim, int dtype, int device) {
  if (rows <= 0 || dim <= 0 || dim > flg::kWidest || head_dim <= 0) return -static_cast<int64_t>(cudaErrorInvalidValue);
  int64_t sms = 0, runs = 0;
  const cudaError_t err = flg::count_sms(device, sms);
  if (err != cudaSuccess) return -static_cast<int64_t>(err);
  const int bad = flg::with_type(dtype, [&](auto t) {
    return flg::with_rope_width(dim, head_dim, [&](auto w) {
      runs = flg::backward_runs<decltype(t), decltype(w)>(rows, sms).count;
      return cudaSuccess;
    });
  });
  return bad ? -static_cast<int64_t>(bad) : runs;
}

extern "C" int flg_qk_norm_rope_backward(const flg_qk_norm_rope_backward_params* params, void* stream) {
  const auto& p = *params;
  FLG_REQUIRE(flg::valid(p) && flg::aligned(p.sums) && flg::aligned(p.partial));
  for (int i = 0; i < 2; ++i) FLG_REQUIRE(flg::aligned(p.dx[i]) && flg::aligned(p.dout[i]));
  if (p.rows == 0) return 0;
  const flg::DeviceGuard guard(p.device);
  FLG_TRY(guard.status);
  int64_t sms = 0;
  FLG_TRY(flg::count_sms(p.device, sms));
  return flg::with_type(p.dtype, [&](auto t) {
    return flg::with_rope_width(p.dim, p.head_dim,
                                [&](auto w) { return flg::backward<decltype(t)>(w, p, sms, stream); });
  });
}

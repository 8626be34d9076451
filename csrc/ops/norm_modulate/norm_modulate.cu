#include <algorithm>

#include "flg/check.h"
#include "norm_modulate.cuh"

namespace flg {
namespace {

constexpr int64_t kGroupsPerSm = 16;  // short runs even out the tail; each run re-reads only one modulation row

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T, int kThreads, int kVecs>
void launch_exact(const flg_norm_modulate_params& p, int sms, cudaStream_t stream) {
  const int64_t rows_per_group = ceil_div(p.rows, sms * kGroupsPerSm);
  const int64_t blocks = ceil_div(ceil_div(p.rows, rows_per_group), kBlock / kThreads);
  norm_modulate_kernel<T, kThreads, kVecs><<<static_cast<unsigned>(blocks), kBlock, 0, stream>>>(p, rows_per_group);
}

template <typename T>
void launch(const flg_norm_modulate_params& p, int sms, cudaStream_t stream) {
  switch (p.dim) {
    case 1536: return launch_exact<T, 32, 6>(p, sms, stream);   // Wan 1.3B: a warp per row
    case 3072: return launch_exact<T, 128, 3>(p, sms, stream);  // HunyuanVideo
    case 5120: return launch_exact<T, 128, 5>(p, sms, stream);  // Wan 14B
    default: {
      const auto blocks = static_cast<unsigned>(std::min<int64_t>(p.rows, int64_t{1} << 30));
      norm_modulate_any_kernel<T><<<blocks, kBlock, 0, stream>>>(p);
    }
  }
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace
}  // namespace flg

extern "C" int flg_norm_modulate(const flg_norm_modulate_params* params, void* stream) {
  const flg_norm_modulate_params& p = *params;
  FLG_REQUIRE(p.rows >= 0 && p.dim > 0 && p.dim % flg::kVec == 0 && p.rows_per_mod > 0);
  FLG_REQUIRE(flg::aligned(p.out) && flg::aligned(p.x) && flg::aligned(p.scale) && flg::aligned(p.shift));
  FLG_REQUIRE(p.scale_stride % 4 == 0 && p.shift_stride % 4 == 0);
  if (p.rows == 0) return 0;

  const flg::DeviceGuard guard(p.device);
  FLG_TRY(guard.status);
  int sms = 0;
  FLG_TRY(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, p.device));
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case FLG_F32: flg::launch<float>(p, sms, s); break;
    case FLG_F16: flg::launch<__half>(p, sms, s); break;
    case FLG_BF16: flg::launch<__nv_bfloat16>(p, sms, s); break;
    default: return static_cast<int>(cudaErrorInvalidValue);
  }
  return static_cast<int>(cudaGetLastError());
}

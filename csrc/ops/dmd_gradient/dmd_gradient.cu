#include <algorithm>

#include "dmd_gradient.cuh"
#include "flg/launch.h"

namespace flg {
namespace {

// T: type of x0, x_t and grad; V: type of the four velocities.
template <typename T, typename V>
cudaError_t dmd_gradient(const flg_dmd_gradient_params& p, int64_t sms, void* stream) {
  const auto kernel = dmd_gradient_kernel<T, V>;
  int per_sm = 0;
  const cudaError_t err = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kDmdThreads, 0);
  if (err != cudaSuccess) return err;
  const int64_t wanted = ceil_div(p.size, kDmdThreads * kVec);
  // A cooperative launch fails with more blocks than fit on the GPU at the same time.
  const int64_t blocks = std::min({wanted, sms * per_sm, int64_t{FLG_DMD_GRADIENT_BLOCKS}});
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), kDmdThreads, stream, true, p);
}

}  // namespace
}  // namespace flg

extern "C" int flg_dmd_gradient(const flg_dmd_gradient_params* params, void* stream) {
  const auto& p = *params;
  FLG_REQUIRE(p.samples >= 0 && p.size > 0 && p.size % flg::kVec == 0);
  for (const void* pointer :
       {static_cast<const void*>(p.grad), p.x0, p.x_t, p.v_fake, p.v_weak_cond, p.v_weak_null, p.v_strong_cond})
    FLG_REQUIRE(flg::aligned(pointer));
  FLG_REQUIRE(p.x_dtype == p.v_dtype || p.x_dtype == FLG_F32);
  if (p.samples == 0) return 0;
  const flg::DeviceGuard guard(p.device);
  FLG_TRY(guard.status);
  int64_t sms = 0;
  FLG_TRY(flg::count_sms(p.device, sms));
  return flg::with_type(p.v_dtype, [&](auto v) {
    using V = decltype(v);
    return p.x_dtype == p.v_dtype ? flg::dmd_gradient<V, V>(p, sms, stream)
                                  : flg::dmd_gradient<float, V>(p, sms, stream);
  });
}

#include "gemm.cuh"
#include "linear_gelu_tanh.h"

namespace flg::gemm {
namespace {

// GELU by the tanh formula, 0.5 z (1 + tanh u), rewritten as z / (1 + exp(-2 u)). CUTLASS's GELU_taylor is not used:
// for negative z its approximate tanh cancels against the 1, which leaves a relative error of several percent.
template <typename T>
struct GeluTanh;

template <>
struct GeluTanh<float> {
  CUTLASS_DEVICE float operator()(float z) const {
    const float u = 0.7978845608028654f * z * (1.0f + 0.044715f * z * z);  // sqrt(2 / pi) (z + 0.044715 z^3)
    return __fdividef(z, 1.0f + __expf(-2.0f * u));
  }
};

template <int N>
struct GeluTanh<cutlass::Array<float, N>> {
  CUTLASS_DEVICE cutlass::Array<float, N> operator()(const cutlass::Array<float, N>& z) const {
    cutlass::Array<float, N> out;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) out[i] = GeluTanh<float>{}(z[i]);
    return out;
  }
};

// The epilogue also stores z, its input, as the auxiliary output ("Aux").
using Gelu = cutlass::epilogue::fusion::LinCombPerColBiasEltActAux<RowMajor, GeluTanh, Element, float, Element, Element,
                                                                   void, float>;

}  // namespace
}  // namespace flg::gemm

extern "C" int flg_linear_gelu_tanh(const flg_linear_gelu_tanh_params* params, void* stream) {
  using namespace flg::gemm;
  const auto& p = *params;
  FLG_REQUIRE(fits(p.rows, p.dim, p.inner));
  for (const void* pointer : {static_cast<const void*>(p.out), static_cast<const void*>(p.z), p.x, p.weight, p.bias})
    FLG_REQUIRE(flg::aligned(pointer));
  if (p.rows == 0) return 0;
  const flg::DeviceGuard guard(p.device);
  FLG_TRY(guard.status);
  Matmul<Gelu, void>::Epilogue::FusionCallbacks::Arguments fusion{};
  fusion.bias_ptr = static_cast<const Element*>(p.bias);
  fusion.aux_ptr = static_cast<Element*>(p.z);
  fusion.dAux = cute::make_stride(p.dim, cute::_1{}, int64_t{0});
  return Matmul<Gelu, void>::run(p.x, p.weight, nullptr, p.out, p.rows, p.dim, p.inner, fusion, p.device, stream);
}

#include "gemm.cuh"
#include "linear_gate_residual.h"

namespace flg::gemm {
namespace {

using namespace cutlass::epilogue::fusion;

// The epilogue gate * (acc + bias) + c: computed in float32, rounded to bfloat16 once.
using Biased = Sm90EVT<Sm90Compute<cutlass::plus, float, float, kRound>, Sm90AccFetch, Row<Element>>;
using GateResidual = Sm90EVT<Sm90Compute<cutlass::homogeneous_multiply_add, Element, float, kRound>, Row<float>, Biased,
                             Sm90SrcFetch<Element>>;

}  // namespace
}  // namespace flg::gemm

extern "C" int flg_linear_gate_residual(const flg_linear_gate_residual_params* params, void* stream) {
  using namespace flg::gemm;
  const auto& p = *params;
  FLG_REQUIRE(fits(p.rows_per_mod, p.dim, p.inner) && p.rows_per_mod > 0 && p.rows % p.rows_per_mod == 0);
  for (const void* pointer :
       {static_cast<const void*>(p.out), p.c, p.x, p.weight, p.bias, static_cast<const void*>(p.gate)})
    FLG_REQUIRE(flg::aligned(pointer));
  const flg::DeviceGuard guard(p.device);
  FLG_TRY(guard.status);
  // One launch per gate row: the epilogue broadcasts one vector over all the rows of a product.
  for (int64_t first = 0; first < p.rows; first += p.rows_per_mod) {
    const auto* gate = p.gate + first / p.rows_per_mod * p.dim;
    const auto at = [&](const void* base, int64_t width) { return static_cast<const Element*>(base) + first * width; };
    const int error = Matmul<GateResidual, Element>::run(
        at(p.x, p.inner), p.weight, at(p.c, p.dim), static_cast<Element*>(p.out) + first * p.dim, p.rows_per_mod, p.dim,
        p.inner, {{gate}, {{}, {static_cast<const Element*>(p.bias)}, {}}, {}, {}}, p.device, stream);
    if (error != 0) return error;
  }
  return 0;
}

#ifdef FLG_GEMM  // CMakeLists.txt defines it when it finds CUTLASS
#include "args.h"
#include "linear_gate_residual.h"
#include "linear_gelu_tanh.h"

#define RESIDUAL(member) FLG_FIELD(flg_linear_gate_residual_params, member)
#define GELU(member) FLG_FIELD(flg_linear_gelu_tanh_params, member)

void bind_gemm(py::module_& m) {
  flg::bind(m, "linear_gate_residual", &flg_linear_gate_residual,
            {RESIDUAL(out), RESIDUAL(c), RESIDUAL(x), RESIDUAL(weight), RESIDUAL(bias), RESIDUAL(gate), RESIDUAL(rows),
             RESIDUAL(dim), RESIDUAL(inner), RESIDUAL(rows_per_mod), RESIDUAL(device)});
  flg::bind(m, "linear_gelu_tanh", &flg_linear_gelu_tanh,
            {GELU(out), GELU(z), GELU(x), GELU(weight), GELU(bias), GELU(rows), GELU(dim), GELU(inner), GELU(device)});
}
#endif

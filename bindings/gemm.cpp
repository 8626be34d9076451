#ifdef FLG_GEMM  // CMakeLists.txt defines it when it finds CUTLASS
#include "args.h"
#include "linear_gate_residual.h"
#include "linear_gelu_tanh.h"

static int gate_residual(Ptr out, Ptr c, Ptr x, Ptr weight, Ptr bias, Ptr gate, int64_t rows, int64_t dim,
                         int64_t inner, int64_t rows_per_mod, int device, Ptr stream) {
  const flg_linear_gate_residual_params params{out, c, x, weight, bias, gate, rows, dim, inner, rows_per_mod, device};
  return flg_linear_gate_residual(&params, stream);
}

static int gelu_tanh(Ptr out, Ptr z, Ptr x, Ptr weight, Ptr bias, int64_t rows, int64_t dim, int64_t inner, int device,
                     Ptr stream) {
  const flg_linear_gelu_tanh_params params{out, z, x, weight, bias, rows, dim, inner, device};
  return flg_linear_gelu_tanh(&params, stream);
}

void bind_gemm(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def("linear_gate_residual", &gate_residual, no_gil);
  m.def("linear_gelu_tanh", &gelu_tanh, no_gil);
}
#endif

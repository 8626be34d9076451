// Registers the functions of fastlightgen._C. Built without nvcc, the module reads weights and says that it has no
// kernels.
#include <pybind11/pybind11.h>

#include "flg/error.h"

namespace py = pybind11;

void bind_read_tensors(py::module_& m);
#ifdef FLG_CUDA_ARCHS
void bind_dmd_gradient(py::module_& m);
void bind_gate_residual_norm_modulate(py::module_& m);
void bind_qk_norm_rope(py::module_& m);
#endif
#ifdef FLG_GEMM
void bind_gemm(py::module_& m);
#endif

PYBIND11_MODULE(_C, m) {
  bind_read_tensors(m);
  m.attr("interface") = 5;  // increase with every change of a binding; ops/dispatch.py refuses another number
#ifdef FLG_CUDA_ARCHS
  m.def("cuda_built", [] { return true; });
  m.def("archs", [] { return FLG_CUDA_ARCHS; });  // e.g. "90a" or "80;90a"
  m.def("error_string", &flg_error_string);
  bind_dmd_gradient(m);
  bind_gate_residual_norm_modulate(m);
  bind_qk_norm_rope(m);
#else
  m.def("cuda_built", [] { return false; });
  m.def("archs", [] { return ""; });
#endif
#ifdef FLG_GEMM
  m.def("gemm_built", [] { return true; });
  bind_gemm(m);
#else
  m.def("gemm_built", [] { return false; });
#endif
}

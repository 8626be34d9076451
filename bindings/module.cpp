// fastlightgen._C: registration only. Without nvcc the module is built all the same and says so.
#include <pybind11/pybind11.h>

namespace py = pybind11;

#ifdef FLG_CUDA_ARCHS
void bind_norm_modulate(py::module_& m);
#endif

PYBIND11_MODULE(_C, m) {
#ifdef FLG_CUDA_ARCHS
  m.def("cuda_built", [] { return true; });
  m.def("archs", [] { return FLG_CUDA_ARCHS; });  // e.g. "90a" or "80;90a"
  bind_norm_modulate(m);
#else
  m.def("cuda_built", [] { return false; });
  m.def("archs", [] { return ""; });
#endif
}

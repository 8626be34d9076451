#include "norm_modulate.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

// Pointers and the stream arrive as integers: no tensor type crosses this line. Python has checked the arguments.
static int norm_modulate(uintptr_t out, uintptr_t x, uintptr_t scale, uintptr_t shift, int64_t rows, int64_t dim,
                         int64_t rows_per_mod, int64_t scale_stride, int64_t shift_stride, float eps, int dtype,
                         int device, uintptr_t stream) {
  const flg_norm_modulate_params params{reinterpret_cast<void*>(out),
                                        reinterpret_cast<const void*>(x),
                                        reinterpret_cast<const float*>(scale),
                                        reinterpret_cast<const float*>(shift),
                                        rows,
                                        dim,
                                        rows_per_mod,
                                        scale_stride,
                                        shift_stride,
                                        eps,
                                        dtype,
                                        device};
  return flg_norm_modulate(&params, reinterpret_cast<void*>(stream));
}

void bind_norm_modulate(py::module_& m) {
  m.def("norm_modulate", &norm_modulate, py::call_guard<py::gil_scoped_release>());
}

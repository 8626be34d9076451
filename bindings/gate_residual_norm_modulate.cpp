#include "gate_residual_norm_modulate.h"

#include "args.h"

static int forward(Ptr x_out, Ptr h, Ptr x, Ptr y, Ptr gate, Ptr scale, Ptr shift, int64_t rows, int64_t dim,
                   int64_t rows_per_mod, int64_t gate_stride, int64_t scale_stride, int64_t shift_stride, float offset,
                   float eps, int dtype, int device, Ptr stream) {
  const flg_gate_residual_norm_modulate_params params{
      x_out,        h,      x,   y,     gate,  scale, shift, rows, dim, rows_per_mod, gate_stride, scale_stride,
      shift_stride, offset, eps, dtype, device};
  return flg_gate_residual_norm_modulate(&params, stream);
}

static int backward(Ptr dx, Ptr dy, Ptr sums, Ptr partial, Ptr dh, Ptr dx_out, Ptr x_out, Ptr y, Ptr gate, Ptr scale,
                    int64_t rows, int64_t dim, int64_t rows_per_mod, int64_t gate_stride, int64_t scale_stride,
                    float offset, float eps, int dtype, int device, Ptr stream) {
  const flg_gate_residual_norm_modulate_backward_params params{
      dx,   dy,  sums,         partial,     dh,           dx_out, x_out, y,     gate,  scale,
      rows, dim, rows_per_mod, gate_stride, scale_stride, offset, eps,   dtype, device};
  return flg_gate_residual_norm_modulate_backward(&params, stream);
}

void bind_gate_residual_norm_modulate(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def("gate_residual_norm_modulate", &forward, no_gil);
  m.def("gate_residual_norm_modulate_backward", &backward, no_gil);
  // Python allocates the backward pass's scratch tensor, so it needs the number of its rows.
  m.def("gate_residual_norm_modulate_runs", &flg_gate_residual_norm_modulate_runs, no_gil);
}

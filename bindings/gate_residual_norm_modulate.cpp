#include "gate_residual_norm_modulate.h"

#include "args.h"

#define FORWARD(member) FLG_FIELD(flg_gate_residual_norm_modulate_params, member)
#define BACKWARD(member) FLG_FIELD(flg_gate_residual_norm_modulate_backward_params, member)

void bind_gate_residual_norm_modulate(py::module_& m) {
  flg::bind(m, "gate_residual_norm_modulate", &flg_gate_residual_norm_modulate,
            {FORWARD(x_out), FORWARD(h), FORWARD(x), FORWARD(y), FORWARD(gate), FORWARD(scale), FORWARD(shift),
             FORWARD(rows), FORWARD(dim), FORWARD(rows_per_mod), FORWARD(gate_stride), FORWARD(scale_stride),
             FORWARD(shift_stride), FORWARD(offset), FORWARD(eps), FORWARD(dtype), FORWARD(device)});
  flg::bind(m, "gate_residual_norm_modulate_backward", &flg_gate_residual_norm_modulate_backward,
            {BACKWARD(dx), BACKWARD(dy), BACKWARD(sums), BACKWARD(partial), BACKWARD(dh), BACKWARD(dx_out),
             BACKWARD(x_out), BACKWARD(y), BACKWARD(gate), BACKWARD(scale), BACKWARD(rows), BACKWARD(dim),
             BACKWARD(rows_per_mod), BACKWARD(gate_stride), BACKWARD(scale_stride), BACKWARD(offset), BACKWARD(eps),
             BACKWARD(dtype), BACKWARD(device)});
  // Python allocates the backward pass's scratch tensor, so it needs the number of its rows.
  m.def("gate_residual_norm_modulate_runs", &flg_gate_residual_norm_modulate_runs);
}

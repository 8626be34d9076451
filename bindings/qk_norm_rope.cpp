#include "qk_norm_rope.h"

#include <pybind11/stl.h>

#include "args.h"

using Pair = std::array<Ptr, 2>;  // q's and k's tensor

// The rotary tables: an address, a length and a number of channel pairs for each of frames, rows and columns.
static flg_rope rope(const std::array<Ptr, 3>& factors, const std::array<int, 3>& size,
                     const std::array<int, 3>& pairs) {
  return {{factors[0], factors[1], factors[2]}, {size[0], size[1], size[2]}, {pairs[0], pairs[1], pairs[2]}};
}

static int forward(Pair out, Pair in, Pair weight, std::array<Ptr, 3> factors, std::array<int, 3> size,
                   std::array<int, 3> pairs, int64_t rows, int64_t tokens, int64_t dim, int head_dim, bool per_head,
                   float eps, int dtype, int device, Ptr stream) {
  const flg_qk_norm_rope_params params{{out[0], out[1]},
                                       {in[0], in[1]},
                                       {weight[0], weight[1]},
                                       rope(factors, size, pairs),
                                       rows,
                                       tokens,
                                       dim,
                                       head_dim,
                                       per_head,
                                       eps,
                                       dtype,
                                       device};
  return flg_qk_norm_rope(&params, stream);
}

static int backward(Pair dx, Ptr sums, Ptr partial, Pair dout, Pair in, Pair weight, std::array<Ptr, 3> factors,
                    std::array<int, 3> size, std::array<int, 3> pairs, int64_t rows, int64_t tokens, int64_t dim,
                    int head_dim, bool per_head, float eps, int dtype, int device, Ptr stream) {
  const flg_qk_norm_rope_backward_params params{{dx[0], dx[1]},
                                                sums,
                                                partial,
                                                {dout[0], dout[1]},
                                                {in[0], in[1]},
                                                {weight[0], weight[1]},
                                                rope(factors, size, pairs),
                                                rows,
                                                tokens,
                                                dim,
                                                head_dim,
                                                per_head,
                                                eps,
                                                dtype,
                                                device};
  return flg_qk_norm_rope_backward(&params, stream);
}

void bind_qk_norm_rope(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def("qk_norm_rope", &forward, no_gil);
  m.def("qk_norm_rope_backward", &backward, no_gil);
  m.def("qk_norm_rope_runs", &flg_qk_norm_rope_runs, no_gil);  // rows of the backward pass's scratch tensor
}

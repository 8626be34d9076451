#include "qk_norm_rope.h"

#include "args.h"

#define FORWARD(member) FLG_FIELD(flg_qk_norm_rope_params, member)
#define BACKWARD(member) FLG_FIELD(flg_qk_norm_rope_backward_params, member)

void bind_qk_norm_rope(py::module_& m) {
  flg::bind(m, "qk_norm_rope", &flg_qk_norm_rope,
            {FORWARD(out), FORWARD(x), FORWARD(weight), FORWARD(rope.factors), FORWARD(rope.size), FORWARD(rope.pairs),
             FORWARD(rows), FORWARD(tokens), FORWARD(dim), FORWARD(head_dim), FORWARD(per_head), FORWARD(eps),
             FORWARD(dtype), FORWARD(device)});
  flg::bind(m, "qk_norm_rope_backward", &flg_qk_norm_rope_backward,
            {BACKWARD(dx), BACKWARD(sums), BACKWARD(partial), BACKWARD(dout), BACKWARD(x), BACKWARD(weight),
             BACKWARD(rope.factors), BACKWARD(rope.size), BACKWARD(rope.pairs), BACKWARD(rows), BACKWARD(tokens),
             BACKWARD(dim), BACKWARD(head_dim), BACKWARD(per_head), BACKWARD(eps), BACKWARD(dtype), BACKWARD(device)});
  m.def("qk_norm_rope_runs", &flg_qk_norm_rope_runs);  // rows of the backward pass's scratch tensor
}

#include "dmd_gradient.h"

#include "args.h"

#define FIELD(member) FLG_FIELD(flg_dmd_gradient_params, member)

void bind_dmd_gradient(py::module_& m) {
  flg::bind(m, "dmd_gradient", &flg_dmd_gradient,
            {FIELD(grad), FIELD(normaliser), FIELD(partial), FIELD(x0), FIELD(x_t), FIELD(v_fake), FIELD(v_weak_cond),
             FIELD(v_weak_null), FIELD(v_strong_cond), FIELD(t), FIELD(beta1), FIELD(beta2), FIELD(samples),
             FIELD(size), FIELD(x_dtype), FIELD(v_dtype), FIELD(device)});
  m.attr("dmd_gradient_blocks") = FLG_DMD_GRADIENT_BLOCKS;  // width of the scratch tensor `partial`
}

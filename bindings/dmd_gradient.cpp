#include "dmd_gradient.h"

#include "args.h"

static int dmd_gradient(Ptr grad, Ptr normaliser, Ptr partial, Ptr x0, Ptr x_t, Ptr v_fake, Ptr v_weak_cond,
                        Ptr v_weak_null, Ptr v_strong_cond, Ptr t, Ptr beta1, Ptr beta2, int64_t samples, int64_t size,
                        int x_dtype, int v_dtype, int device, Ptr stream) {
  const flg_dmd_gradient_params params{grad,        normaliser,  partial,       x0,      x_t,   v_fake,
                                       v_weak_cond, v_weak_null, v_strong_cond, t,       beta1, beta2,
                                       samples,     size,        x_dtype,       v_dtype, device};
  return flg_dmd_gradient(&params, stream);
}

void bind_dmd_gradient(py::module_& m) {
  m.def("dmd_gradient", &dmd_gradient, py::call_guard<py::gil_scoped_release>());
  m.attr("dmd_gradient_blocks") = FLG_DMD_GRADIENT_BLOCKS;  // width of the scratch tensor `partial`
}

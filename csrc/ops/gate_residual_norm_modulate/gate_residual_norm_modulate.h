/* x' = x + gate y, then h = LayerNorm(x') (offset + scale) + shift. Without y, x' = x: this is norm_modulate.
   offset = 1 is modulation, offset = 0 an affine norm. Plain C, so that the bindings need no CUDA header. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* x, y, x_out and h are [rows, dim], dense and 16-byte aligned. gate, scale and shift are float32 tables
   [rows / rows_per_mod, dim]: row r of x uses table row r / rows_per_mod. A table's stride between rows is counted in
   elements and a multiple of 4. */
typedef struct {
  void* x_out; /* x', written only with y */
  void* h;
  const void* x;
  const void* y;     /* null: no pending residual */
  const float* gate; /* null: x' = x + y */
  const float* scale;
  const float* shift;
  int64_t rows;
  int64_t dim; /* a multiple of 8, at most 5120 */
  int64_t rows_per_mod;
  int64_t gate_stride;
  int64_t scale_stride;
  int64_t shift_stride;
  float offset;
  float eps;
  int dtype; /* flg_dtype of x, y, x_out and h */
  int device;
} flg_gate_residual_norm_modulate_params;

/* The gradients. With a gate: dx, dy and the sums dscale, dshift, dgate (kinds = 3). Without a gate: dx, which is also
   y's gradient, and the sums dscale, dshift (kinds = 2). */
typedef struct {
  void* dx;
  void* dy;       /* only with a gate */
  float* sums;    /* [rows / rows_per_mod, kinds, dim] */
  float* partial; /* scratch [runs, kinds, dim], see flg_gate_residual_norm_modulate_runs; may be `sums` if both have
                     the same shape */
  const void* dh; /* gradient of h */
  const void* dx_out; /* gradient of x', or null */
  const void* x_out;  /* x' */
  const void* y;      /* only with a gate */
  const float* gate;  /* null: no gate */
  const float* scale;
  int64_t rows;
  int64_t dim;
  int64_t rows_per_mod;
  int64_t gate_stride;
  int64_t scale_stride;
  float offset;
  float eps;
  int dtype;
  int device;
} flg_gate_residual_norm_modulate_backward_params;

/* Enqueue on `stream` (a cudaStream_t); return a cudaError, 0 for success. */
int flg_gate_residual_norm_modulate(const flg_gate_residual_norm_modulate_params* params, void* stream);
int flg_gate_residual_norm_modulate_backward(const flg_gate_residual_norm_modulate_backward_params* params,
                                             void* stream);

/* The number of runs, which is the length of `partial`; a negated cudaError on failure. */
int64_t flg_gate_residual_norm_modulate_runs(int64_t rows, int64_t dim, int64_t rows_per_mod, int dtype, int device);

#ifdef __cplusplus
}
#endif

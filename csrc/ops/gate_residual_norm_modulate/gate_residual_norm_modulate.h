/* x' = x + gate y; h = LayerNorm(x') (offset + scale) + shift. Without y it is the norm of x alone: norm_modulate.
   offset 1: modulation; offset 0: an affine norm. Plain C: the bindings see this file and no CUDA header. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* [rows, dim] tensors are dense and 16-byte aligned; gate, scale and shift are float32 tables [rows / rows_per_mod,
   dim] of which row r of x reads row r / rows_per_mod, with a stride between rows that is a multiple of 4 elements. */
typedef struct {
  void* x_out; /* x', written only with y */
  void* h;
  const void* x;
  const void* y;     /* null: nothing is pending */
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
  int dtype; /* of x, y, x_out and h: flg_dtype */
  int device;
} flg_gate_residual_norm_modulate_params;

/* The gradients. With a gate: dx, dy and sums of dscale, dshift, dgate (kinds = 3). Without: dx (also y's gradient) and
   sums of dscale, dshift (kinds = 2). */
typedef struct {
  void* dx;
  void* dy;       /* with a gate */
  float* sums;    /* [rows / rows_per_mod, kinds, dim] */
  float* partial; /* [runs, kinds, dim], see flg_gate_residual_norm_modulate_runs; may be sums if runs are as many */
  const void* dh; /* gradient of h */
  const void* dx_out; /* gradient of x', or null */
  const void* x_out;  /* x' */
  const void* y;      /* with a gate */
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

/* Enqueue on `stream` (a cudaStream_t); return a cudaError, 0 when all is well. */
int flg_gate_residual_norm_modulate(const flg_gate_residual_norm_modulate_params* params, void* stream);
int flg_gate_residual_norm_modulate_backward(const flg_gate_residual_norm_modulate_backward_params* params,
                                             void* stream);

/* The rows of `partial` that the backward pass needs; a negated cudaError when it cannot be told. */
int64_t flg_gate_residual_norm_modulate_runs(int64_t rows, int64_t dim, int64_t rows_per_mod, int dtype, int device);

#ifdef __cplusplus
}
#endif

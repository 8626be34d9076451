/* out = LayerNorm(x) (1 + scale) + shift, forward. Plain C: this is all that the bindings see. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  void* out;          /* [rows, dim], 16-byte aligned, dense */
  const void* x;      /* [rows, dim], 16-byte aligned, dense */
  const float* scale; /* [rows / rows_per_mod, dim]: row r of x uses row r / rows_per_mod */
  const float* shift; /* as scale */
  int64_t rows;
  int64_t dim; /* a multiple of 8 */
  int64_t rows_per_mod;
  int64_t scale_stride; /* elements from one modulation row to the next, a multiple of 4 */
  int64_t shift_stride;
  float eps;
  int dtype; /* of x and out: flg_dtype */
  int device;
} flg_norm_modulate_params;

/* Enqueues on `stream` (a cudaStream_t); returns a cudaError, 0 when all is well. */
int flg_norm_modulate(const flg_norm_modulate_params* params, void* stream);

#ifdef __cplusplus
}
#endif

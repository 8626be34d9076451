/* out = c + gate (x weight^T + bias): the last matrix product of a block adds the residual itself. bfloat16, sm_90a. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  void* out;          /* [rows, dim]; all tensors dense and 16-byte aligned */
  const void* c;      /* [rows, dim] */
  const void* x;      /* [rows, inner] */
  const void* weight; /* [dim, inner] */
  const void* bias;   /* [dim], or null */
  const float* gate;  /* [rows / rows_per_mod, dim]: row r of x reads row r / rows_per_mod */
  int64_t rows;
  int64_t dim; /* dim and inner are multiples of 8 */
  int64_t inner;
  int64_t rows_per_mod;
  int device;
} flg_linear_gate_residual_params;

/* Enqueues on `stream` (a cudaStream_t), one launch per row of the gate; returns a cudaError, 0 for success. */
int flg_linear_gate_residual(const flg_linear_gate_residual_params* params, void* stream);

#ifdef __cplusplus
}
#endif

/* z = x weight^T + bias, out = GELU(z) by the tanh formula; the backward pass needs z. bfloat16, sm_90a. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  void* out;          /* [rows, dim]; all tensors dense and 16-byte aligned */
  void* z;            /* [rows, dim], or null: do not store it */
  const void* x;      /* [rows, inner] */
  const void* weight; /* [dim, inner] */
  const void* bias;   /* [dim], or null */
  int64_t rows;
  int64_t dim; /* dim and inner are multiples of 8 */
  int64_t inner;
  int device;
} flg_linear_gelu_tanh_params;

/* Enqueues on `stream` (a cudaStream_t); returns a cudaError, 0 for success. */
int flg_linear_gelu_tanh(const flg_linear_gelu_tanh_params* params, void* stream);

#ifdef __cplusplus
}
#endif

/* The distribution-matching gradient in one launch: with v_real = null + beta1 (weak - null) + beta2 (strong - weak),
   normaliser = mean |x0 - (x_t - t v_real)| + 1e-6 of each sample and grad = t (v_real - v_fake) / normaliser. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLG_DMD_GRADIENT_BLOCKS 1024

typedef struct {
  void* grad;        /* [samples, size], type x_dtype; all tensors dense and 16-byte aligned */
  float* normaliser; /* [samples] */
  float* partial;    /* [samples, FLG_DMD_GRADIENT_BLOCKS], scratch */
  const void* x0;    /* x_dtype */
  const void* x_t;   /* x_dtype */
  const void* v_fake;
  const void* v_weak_cond;
  const void* v_weak_null;
  const void* v_strong_cond; /* v_dtype, all four */
  const float* t;            /* [samples] */
  const float* beta1;
  const float* beta2;
  int64_t samples;
  int64_t size; /* elements of a sample, a multiple of 8 */
  int x_dtype;
  int v_dtype; /* x_dtype, or anything with an x_dtype of float32 */
  int device;
} flg_dmd_gradient_params;

/* Enqueues on `stream` (a cudaStream_t); returns a cudaError, 0 when all is well. */
int flg_dmd_gradient(const flg_dmd_gradient_params* params, void* stream);

#ifdef __cplusplus
}
#endif

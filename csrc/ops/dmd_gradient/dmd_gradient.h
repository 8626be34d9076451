/* The distribution-matching gradient (Eq. 8 and 9) in one launch. For each sample:
   v_real = v_weak_null + beta1 (v_weak_cond - v_weak_null) + beta2 (v_strong_cond - v_weak_cond),
   normaliser = mean |x0 - (x_t - t v_real)| + 1e-6, grad = t (v_real - v_fake) / normaliser. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLG_DMD_GRADIENT_BLOCKS 1024

typedef struct {
  void* grad;         /* [samples, size], x_dtype; all tensors are dense and 16-byte aligned */
  float* normaliser;  /* [samples] */
  float* partial;     /* [samples, FLG_DMD_GRADIENT_BLOCKS], scratch */
  const void* x0;     /* x_dtype */
  const void* x_t;    /* x_dtype */
  const void* v_fake; /* this and the next three: v_dtype */
  const void* v_weak_cond;
  const void* v_weak_null;
  const void* v_strong_cond;
  const float* t; /* this and the next two: [samples] */
  const float* beta1;
  const float* beta2;
  int64_t samples;
  int64_t size; /* elements of a sample, a multiple of 8 */
  int x_dtype;
  int v_dtype; /* equal to x_dtype, or any type if x_dtype is float32 */
  int device;
} flg_dmd_gradient_params;

/* Enqueues on `stream` (a cudaStream_t); returns a cudaError, 0 for success. */
int flg_dmd_gradient(const flg_dmd_gradient_params* params, void* stream);

#ifdef __cplusplus
}
#endif

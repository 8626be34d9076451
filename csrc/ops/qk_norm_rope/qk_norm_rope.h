/* RMS norm of q and k, then the three-axis rotary embedding of the first F H W tokens (the video grid). The tokens
   after them (text) are normed but not rotated. Angles come from one small table per axis, not from a table per token.
 */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLG_ROPE_PAIRS 96 /* the most channel pairs of a head */

typedef struct {
  const float* factors[3]; /* for frames, rows and columns: [size[axis], pairs[axis], 2], cosine and sine */
  int size[3];             /* F, H, W; none is 0 */
  int pairs[3];            /* channel pairs of a head that the axis rotates; their sum is head_dim / 2, at most
                              FLG_ROPE_PAIRS */
} flg_rope;

/* Index 0 is q, 1 is k. x and out are [rows, dim], dense and 16-byte aligned. */
typedef struct {
  void* out[2];
  const void* x[2];
  const float* weight[2]; /* [dim], or [head_dim] if per_head */
  flg_rope rope;
  int64_t rows; /* samples * tokens */
  int64_t tokens;
  int64_t dim; /* a multiple of head_dim, at most 5120 */
  int head_dim;
  int per_head; /* 0: one norm over the row; 1: a norm per head, then head_dim is a power of two from 8 to 128 */
  float eps;
  int dtype;
  int device;
} flg_qk_norm_rope_params;

typedef struct {
  void* dx[2];
  float* sums;    /* [2, dim]: the weights' gradients per column; with per_head the caller adds the heads */
  float* partial; /* scratch [2, runs, dim], see flg_qk_norm_rope_runs */
  const void* dout[2];
  const void* x[2];
  const float* weight[2];
  flg_rope rope;
  int64_t rows;
  int64_t tokens;
  int64_t dim;
  int head_dim;
  int per_head;
  float eps;
  int dtype;
  int device;
} flg_qk_norm_rope_backward_params;

/* Enqueue on `stream` (a cudaStream_t); return a cudaError, 0 for success. */
int flg_qk_norm_rope(const flg_qk_norm_rope_params* params, void* stream);
int flg_qk_norm_rope_backward(const flg_qk_norm_rope_backward_params* params, void* stream);

/* The number of runs for `partial`; a negated cudaError on failure. */
int64_t flg_qk_norm_rope_runs(int64_t rows, int64_t dim, int head_dim, int dtype, int device);

#ifdef __cplusplus
}
#endif

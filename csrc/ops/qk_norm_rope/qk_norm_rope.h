/* RMS norm of q and k, then the three-axis rotary embedding of the tokens on the grid; the tokens after the grid (text)
   are only normed. Rotations come from one small table per axis, never from a table per token. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  const float* factors[3]; /* [size[axis], pairs[axis], 2]: cosine and sine for frames, rows, columns */
  int size[3];
  int pairs[3]; /* together head_dim / 2: the interleaved channel pairs that each axis turns, frames first */
} flg_rope;

/* Index 0 is q, 1 is k. [rows, dim] tensors are dense and 16-byte aligned. */
typedef struct {
  void* out[2];
  const void* in[2];
  const float* weight[2]; /* [dim], or [head_dim] if per_head */
  flg_rope rope;
  int64_t rows; /* samples * tokens */
  int64_t tokens;
  int64_t dim; /* a multiple of head_dim, at most 5120 */
  int head_dim;
  int per_head; /* 0: one norm over the row; 1: a norm per head, head_dim 8 to 256 and a power of two */
  float eps;
  int dtype;
  int device;
} flg_qk_norm_rope_params;

typedef struct {
  void* dx[2];
  float* sums;    /* [2, dim]: the weights' gradients, per column */
  float* partial; /* [2, runs, dim], see flg_qk_norm_rope_runs */
  const void* dout[2];
  const void* in[2];
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

/* Enqueue on `stream` (a cudaStream_t); return a cudaError, 0 when all is well. */
int flg_qk_norm_rope(const flg_qk_norm_rope_params* params, void* stream);
int flg_qk_norm_rope_backward(const flg_qk_norm_rope_backward_params* params, void* stream);

/* The rows of `partial`; a negated cudaError when it cannot be told. */
int64_t flg_qk_norm_rope_runs(int64_t rows, int64_t dim, int dtype, int device);

#ifdef __cplusplus
}
#endif

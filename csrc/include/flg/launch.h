// Host side: sizes that decide the number of blocks, and the kernel launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "flg/check.h"

namespace flg {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Kernels read 16 bytes at a time. A null pointer counts as aligned.
inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline cudaError_t count_sms(int device, int64_t& sms) {
  int n = 0;
  const cudaError_t err = cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device);
  sms = n;
  return err;
}

// Calls f with a zero of the element type `dtype`; returns f's cudaError, or cudaErrorInvalidValue for an unknown type.
template <typename F>
int with_type(int dtype, F f) {
  switch (dtype) {
    case FLG_F32: return static_cast<int>(f(float{}));
    case FLG_F16: return static_cast<int>(f(__half{}));
    case FLG_BF16: return static_cast<int>(f(__nv_bfloat16{}));
    default: return static_cast<int>(cudaErrorInvalidValue);
  }
}

// Launches a kernel by a function call instead of <<<>>>, so that a host compiler can build it for the CPU tests. A
// cooperative launch keeps all blocks on the GPU at the same time, which a grid-wide barrier needs.
template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, void* stream, bool cooperative, A... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
}

}  // namespace flg

// The part of CUDA that the row kernels use, for a host compiler: one fiber per GPU thread, one block at a time.
// All lanes of a warp must reach a shuffle, all threads of a block a barrier; otherwise the launch fails.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include <cmath>
#include <functional>
#include <tuple>

#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time and keep nothing there across a grid-wide barrier
#ifndef __host__
#define __host__
#define __device__
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
void sync_block();
void sync_grid();
float shuffle_xor(unsigned mask, float v, int lane_mask);
int run(dim3 grid, dim3 block, bool cooperative, const std::function<void()>& kernel);

// A GPU requires aligned vector accesses, a CPU does not: check it here.
template <typename T>
const T& aligned(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T)) abort();
  return *p;
}
}  // namespace simt

inline void __syncthreads() { simt::sync_block(); }
inline float __shfl_xor_sync(unsigned mask, float v, int lane_mask) { return simt::shuffle_xor(mask, v, lane_mask); }
template <typename T>
T __ldg(const T* p) {
  return simt::aligned(p);
}
template <typename T>
T __ldcs(const T* p) {
  return simt::aligned(p);
}
template <typename T>
void __stwb(T* p, T v) {
  simt::aligned(p);
  *p = v;
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

// The CUDA runtime.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
typedef struct CUstream_st* cudaStream_t;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
// Few SMs, so that even a small tensor gives each block several runs of rows. With FLG_LAUNCHERS those of an H100.
#ifdef FLG_LAUNCHERS
constexpr int kSimtSms = 132;
#else
constexpr int kSimtSms = 2;
#endif
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = kSimtSms;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the SIMT shim"; }
template <typename K>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, K, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... args) {
  const std::tuple<P...> copies(args...);
#ifdef FLG_LAUNCHERS
  return cudaSuccess;  // the host's work ends here
#endif
  const int err =
      simt::run(config->gridDim, config->blockDim, config->numAttrs > 0, [&] { std::apply(kernel, copies); });
  return static_cast<cudaError_t>(err);
}

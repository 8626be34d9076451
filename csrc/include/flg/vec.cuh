// Eight neighbouring elements are the unit of work: 16 bytes of half or bfloat16, twice 16 bytes of float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace flg {

constexpr int kVec = 8;

// Eight elements as they lie in memory, so that a prefetched row costs half the registers of its float form.
template <typename T>
struct alignas(16) Packed {
  uint4 word[kVec * sizeof(T) / sizeof(uint4)];
};

template <typename T>
__device__ __forceinline__ Packed<T> load(const T* p) {
  Packed<T> v;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(v) / sizeof(uint4)); ++i)
    v.word[i] = reinterpret_cast<const uint4*>(p)[i];
  return v;
}

// For rows that are read once: first to leave the cache, so that they do not evict the modulation rows.
template <typename T>
__device__ __forceinline__ Packed<T> load_once(const T* p) {
  Packed<T> v;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(v) / sizeof(uint4)); ++i)
    v.word[i] = __ldcs(reinterpret_cast<const uint4*>(p) + i);
  return v;
}

// One modulation row, shared by many rows of x and by every block.
__device__ __forceinline__ void load_mod(const float* p, float (&v)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec / 4; ++i) {
    const float4 q = __ldg(reinterpret_cast<const float4*>(p) + i);
    v[4 * i] = q.x, v[4 * i + 1] = q.y, v[4 * i + 2] = q.z, v[4 * i + 3] = q.w;
  }
}

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T narrow(float v);
template <>
__device__ __forceinline__ float narrow<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <typename T>
__device__ __forceinline__ void unpack(const Packed<T>& packed, float (&v)[kVec]) {
  const T* e = reinterpret_cast<const T*>(&packed);
#pragma unroll
  for (int i = 0; i < kVec; ++i) v[i] = widen(e[i]);
}

template <typename T>
__device__ __forceinline__ void store(T* p, const float (&v)[kVec]) {
  Packed<T> packed;
  T* e = reinterpret_cast<T*>(&packed);
#pragma unroll
  for (int i = 0; i < kVec; ++i) e[i] = narrow<T>(v[i]);
  *reinterpret_cast<Packed<T>*>(p) = packed;
}

}  // namespace flg

// The kernels work on vectors of eight neighbouring elements: 16 bytes of half or bfloat16, 32 bytes of float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace flg {

constexpr int kVec = 8;

// Eight elements in their memory format: a prefetched 16-bit row takes half the registers of its float form.
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

// Loads a vector that is read once, marked to leave the cache first so that it does not evict the modulation rows.
// Returns zeros outside the row (`inside` is a constant for the exact widths).
template <typename T>
__device__ __forceinline__ Packed<T> load_once(const T* p, bool inside) {
  Packed<T> v;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(v) / sizeof(uint4)); ++i)
    v.word[i] = inside ? __ldcs(reinterpret_cast<const uint4*>(p) + i) : make_uint4(0, 0, 0, 0);
  return v;
}

// Loads a vector of a modulation row through the read-only cache: many rows and blocks read the same one.
__device__ __forceinline__ void load_shared_row(const float* p, float (&v)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec / 4; ++i) {
    const float4 q = __ldg(reinterpret_cast<const float4*>(p) + i);
    v[4 * i] = q.x, v[4 * i + 1] = q.y, v[4 * i + 2] = q.z, v[4 * i + 3] = q.w;
  }
}

// Returns the same pointer, but hides that from the compiler: it loads again instead of keeping values in registers.
__device__ __forceinline__ const float* reread(const float* p) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(p));
#endif
  return p;
}

// Loads four numbers from shared memory, at a 16-byte boundary.
__device__ __forceinline__ void load_four(const float* p, float (&v)[4]) {
  const float4 q = *reinterpret_cast<const float4*>(p);
  v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
}

// Copies eight bytes into shared memory. `copies_done` waits for this thread's copies, and a barrier shows them to
// others. No register waits for the data, so that a wait for it does not wait for loads that were issued after it.
__device__ __forceinline__ void copy_to_shared(float2* to, const float2* from) {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
#else
  *to = *from;
#endif
}

__device__ __forceinline__ void copies_done() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Returns the same vector, but hides that from the compiler: it unpacks it again instead of keeping eight floats.
template <typename T>
__device__ __forceinline__ Packed<T> again(Packed<T> v) {
#ifdef __CUDA_ARCH__
#pragma unroll
  for (auto& word : v.word) asm volatile("" : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w));
#endif
  return v;
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

// Rounds to T's precision: the value that a later reader of the stored tensor sees.
template <typename T>
__device__ __forceinline__ float rounded(float v) {
  return widen(narrow<T>(v));
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

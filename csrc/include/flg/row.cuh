// A thread's share of a row.
#pragma once

#include "flg/vec.cuh"
#include "flg/widths.h"

namespace flg {

// Where this thread's vectors lie in a row.
template <typename W>
struct Columns {
  int64_t dim;
  __device__ __forceinline__ explicit Columns(int64_t dim) : dim(W::kExact ? W::kMost : dim) {}
  __device__ __forceinline__ int at(int i) const { return (i * W::kThreads + static_cast<int>(threadIdx.x)) * kVec; }
  __device__ __forceinline__ bool there(int i) const { return W::kExact || at(i) < dim; }
};

// This thread's part of row `row` of a tensor, one step ahead of its use.
template <typename T, typename W>
struct Row {
  Packed<T> part[kVecs];
  __device__ __forceinline__ void load(const void* base, int64_t row, const Columns<W>& col) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i)
      part[i] = load_once(static_cast<const T*>(base) + row * col.dim + col.at(i), col.there(i));
  }
};

}  // namespace flg

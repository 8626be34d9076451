// The part of a row that one thread reads and writes: kVecs vectors of 8 elements.
#pragma once

#include "flg/vec.cuh"
#include "flg/widths.h"

namespace flg {

// The columns of this thread's vectors. Neighbouring threads hold neighbouring vectors, so that loads coalesce.
template <typename W>
struct Columns {
  int64_t dim;
  __device__ __forceinline__ explicit Columns(int64_t dim) : dim(W::kExact ? W::kMost : dim) {}
  // The first column of vector i.
  __device__ __forceinline__ int at(int i) const { return (i * W::kThreads + static_cast<int>(threadIdx.x)) * kVec; }
  // Whether vector i lies inside the row; constant true for the exact widths.
  __device__ __forceinline__ bool inside(int i) const { return W::kExact || at(i) < dim; }
};

// This thread's part of a row, kept packed in registers so that the next row can be loaded ahead of its use.
template <typename T, typename W>
struct Row {
  Packed<T> part[kVecs];
  // A row that is not `present` counts as zeros.
  __device__ __forceinline__ void load(const void* base, int64_t row, const Columns<W>& col, bool present = true) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) load_part(i, base, row, col, present);
  }
  __device__ __forceinline__ void load_part(int i, const void* base, int64_t row, const Columns<W>& col,
                                            bool present = true) {
    part[i] = load_once(static_cast<const T*>(base) + row * col.dim + col.at(i), present && col.inside(i));
  }
};

}  // namespace flg

// Spreads a row over the threads of a block. Each thread holds kVecs vectors of 8: enough bytes in flight to hide the
// latency of memory, and the backward kernel still has registers for three rows of sums.
#pragma once

#include <stdint.h>

namespace flg {

constexpr int kVecs = 2;

// kExact: the row has exactly kThreads * kVecs * 8 elements, so no thread is idle.
template <int kThreads_, bool kExact_>
struct Width {
  static constexpr int kThreads = kThreads_;
  static constexpr bool kExact = kExact_;
  static constexpr int kMost = kThreads * kVecs * 8;  // elements of the widest row
};

constexpr int64_t kWidest = 5120;

// Calls f with the Width for `dim`: exact for the released networks, with idle threads for other widths up to 5120.
template <typename F>
auto with_width(int64_t dim, F f) {
  switch (dim) {
    case 1536: return f(Width<96, true>{});   // Wan 1.3B
    case 3072: return f(Width<192, true>{});  // HunyuanVideo
    case 5120: return f(Width<320, true>{});  // Wan 14B
    default: return dim <= 2048 ? f(Width<128, false>{}) : f(Width<320, false>{});
  }
}

}  // namespace flg

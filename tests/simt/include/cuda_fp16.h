// IEEE half with round to nearest even, by the compiler's _Float16 conversions.
#pragma once

struct alignas(2) __half {
  _Float16 value;
};
inline float __half2float(__half h) { return static_cast<float>(h.value); }
inline __half __float2half_rn(float f) { return {static_cast<_Float16>(f)}; }

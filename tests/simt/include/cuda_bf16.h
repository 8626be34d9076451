// bfloat16: the upper half of a float, round to nearest even; NaN stays NaN.
#pragma once

#include <stdint.h>
#include <string.h>

struct alignas(2) __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 h) {
  const uint32_t wide = static_cast<uint32_t>(h.bits) << 16;
  float f;
  memcpy(&f, &wide, sizeof f);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t wide;
  memcpy(&wide, &f, sizeof f);
  if (f != f) return {0x7fff};
  return {static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
}

// Scalar conversions between float and the element types of a cache.
#pragma once

#include <cstdint>
#include <cstring>

#include "decode_args.h"

namespace mdkv {

// Element types as the bits they are; kernels never do arithmetic in them.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

MDKV_INLINE float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
MDKV_INLINE uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

MDKV_INLINE float to_float(float x) { return x; }
MDKV_INLINE float to_float(BFloat16 x) { return float_from_bits(uint32_t{x.bits} << 16); }
MDKV_INLINE float to_float(Half x) {
  // Shifting the exponent by a multiplication also makes subnormals right.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  if (magnitude >= 0x0f800000u) return float_from_bits(sign | magnitude | 0x7f800000u);
  const float scaled = float_from_bits(magnitude) * float_from_bits(0x77800000u);  // 2^112
  return float_from_bits(sign | bits_of_float(scaled));
}

template <typename E>
E from_float(float x);

template <>
MDKV_INLINE float from_float<float>(float x) {
  return x;
}
template <>
MDKV_INLINE BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bits_of_float(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
MDKV_INLINE Half from_float<Half>(float x) {
  const uint32_t bits = bits_of_float(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520: infinity
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 lets the float adder round at the right bit.
    const float rounded = float_from_bits(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bits_of_float(rounded) - 0x3f000000u))};
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfff + odd) >> 13))};
}

}  // namespace mdkv

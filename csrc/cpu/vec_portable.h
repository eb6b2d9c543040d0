// Vectors of floats as plain loops: the fallback for any processor, and the meaning of the others.
#pragma once

#include <cstdint>
#include <cstring>

#include "element.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

constexpr int kWidth = 8;
constexpr int kMaxVectors = 2;   // accumulators per query head that stay in registers
constexpr int kMaxDotGroup = 2;  // query heads whose dot products of four tokens do

struct Vec {
  float lane[kWidth];
};

MDKV_INLINE Vec set1(float x) {
  Vec v;
  for (int i = 0; i < kWidth; ++i) v.lane[i] = x;
  return v;
}
MDKV_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(v.lane, p, sizeof(v.lane));
  return v;
}
MDKV_INLINE void store(float* p, Vec v) { std::memcpy(p, v.lane, sizeof(v.lane)); }
MDKV_INLINE void store_first(float* p, Vec v, int n) { std::memcpy(p, v.lane, n * sizeof(float)); }

#define MDKV_LANEWISE(name, expression)         \
  MDKV_INLINE Vec name(Vec a, Vec b) {          \
    Vec v;                                      \
    for (int i = 0; i < kWidth; ++i) {          \
      const float x = a.lane[i], y = b.lane[i]; \
      v.lane[i] = expression;                   \
    }                                           \
    return v;                                   \
  }
MDKV_LANEWISE(add, x + y)
MDKV_LANEWISE(sub, x - y)
MDKV_LANEWISE(mul, x* y)
MDKV_LANEWISE(max, x > y ? x : y)
#undef MDKV_LANEWISE

MDKV_INLINE Vec fma(Vec a, Vec b, Vec c) { return add(mul(a, b), c); }

// The first n lanes of v, then the other's.
MDKV_INLINE Vec blend_first(Vec v, Vec other, int n) {
  for (int i = n; i < kWidth; ++i) v.lane[i] = other.lane[i];
  return v;
}
MDKV_INLINE float reduce_max(Vec v) {
  float best = v.lane[0];
  for (int i = 1; i < kWidth; ++i) best = v.lane[i] > best ? v.lane[i] : best;
  return best;
}
MDKV_INLINE float reduce_add(Vec v) {
  float sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += v.lane[i];
  return sum;
}
// Sums of the lanes of four vectors.
MDKV_INLINE void reduce_add4(const Vec (&v)[4], float* sums) {
  for (int i = 0; i < 4; ++i) sums[i] = reduce_add(v[i]);
}
MDKV_INLINE Vec exp2(Vec v) {
  for (int i = 0; i < kWidth; ++i) v.lane[i] = __builtin_exp2f(v.lane[i]);
  return v;
}

template <typename E>
MDKV_INLINE Vec load_elements(const E* p) {
  Vec v;
  for (int i = 0; i < kWidth; ++i) v.lane[i] = to_float(p[i]);
  return v;
}
// The first n elements, then zeros.
template <typename E>
MDKV_INLINE Vec load_first(const E* p, int n) {
  Vec v = set1(0.0f);
  for (int i = 0; i < kWidth && i < n; ++i) v.lane[i] = to_float(p[i]);
  return v;
}
template <typename E>
MDKV_INLINE void store_elements(E* p, Vec v) {
  for (int i = 0; i < kWidth; ++i) p[i] = from_float<E>(v.lane[i]);
}
// Field `field` of the bytes at p, as floats.
template <int kBits>
MDKV_INLINE Vec load_codes(const uint8_t* p, int field) {
  Vec v;
  for (int i = 0; i < kWidth; ++i) {
    v.lane[i] = static_cast<float>((p[i] >> (field * kBits)) & ((1 << kBits) - 1));
  }
  return v;
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

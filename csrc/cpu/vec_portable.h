// Vectors of four floats in the compiler's own vector types: any processor, any architecture.
#pragma once

#include <cstdint>
#include <cstring>

#include "element.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

constexpr int kWidth = 4;
constexpr int kMaxVectors = 2;   // accumulators per query head that stay in registers
constexpr int kMaxDotGroup = 2;  // query heads whose dot products of four tokens do

template <typename T>
using Lanes __attribute__((vector_size(kWidth * sizeof(T)))) = T;
using Vec = Lanes<float>;
using Int32 = Lanes<int32_t>;
using UInt32 = Lanes<uint32_t>;

template <typename To, typename From>
MDKV_INLINE To load_as(const From* p) {
  To v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

MDKV_INLINE Vec set1(float x) { return Vec{x, x, x, x}; }
MDKV_INLINE Vec load(const float* p) { return load_as<Vec>(p); }
MDKV_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
MDKV_INLINE void store_first(float* p, Vec v, int n) { std::memcpy(p, &v, n * sizeof(float)); }
MDKV_INLINE Vec add(Vec a, Vec b) { return a + b; }
MDKV_INLINE Vec sub(Vec a, Vec b) { return a - b; }
MDKV_INLINE Vec mul(Vec a, Vec b) { return a * b; }
MDKV_INLINE Vec div(Vec a, Vec b) { return a / b; }
MDKV_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
MDKV_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
MDKV_INLINE Vec abs(Vec v) {
  return reinterpret_cast<Vec>(reinterpret_cast<Int32>(v) & 0x7fffffff);
}
// To the nearest whole number, ties to even.
MDKV_INLINE Vec nearest(Vec v) {
  // Adding 1.5 * 2^23 leaves no room for a fraction; from 2^22 on that would round too much, and
  // what the codes of a page need is clamped long before.
  const Vec shift = set1(12582912.0f);
  return abs(v) < 4194304.0f ? (v + shift) - shift : v;
}
MDKV_INLINE Vec floor(Vec v) {
  const Vec rounded = nearest(v);
  return rounded > v ? rounded - 1.0f : rounded;
}
MDKV_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

// The first n lanes of v, then the other's.
MDKV_INLINE Vec blend_first(Vec v, Vec other, int n) {
  return Int32{0, 1, 2, 3} < Int32{n, n, n, n} ? v : other;
}
MDKV_INLINE float reduce_max(Vec v) {
  const float low = v[0] > v[1] ? v[0] : v[1], high = v[2] > v[3] ? v[2] : v[3];
  return low > high ? low : high;
}
MDKV_INLINE float reduce_add(Vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }
// Sums of the lanes of four vectors.
MDKV_INLINE void reduce_add4(const Vec (&v)[4], float* sums) {
  for (int i = 0; i < 4; ++i) sums[i] = reduce_add(v[i]);
}

// Lanes below -126 give zero: a weight that small never shows.
MDKV_INLINE Vec exp2(Vec v) {
  const Vec bounded = max(v, set1(-126.0f));
  const Vec whole = nearest(bounded), f = bounded - whole;
  Vec p = set1(1.535336188e-4f);
  p = p * f + 1.339887440e-3f;
  p = p * f + 9.618437357e-3f;
  p = p * f + 5.550332471e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472028e-1f;
  p = p * f + 1.0f;
  const Int32 scaled = reinterpret_cast<Int32>(p) + (__builtin_convertvector(whole, Int32) << 23);
  return v < -126.0f ? set1(0.0f) : reinterpret_cast<Vec>(scaled);
}

MDKV_INLINE Vec load_elements(const float* p) { return load(p); }
MDKV_INLINE Vec load_elements(const BFloat16* p) {
  const UInt32 bits = __builtin_convertvector(load_as<Lanes<uint16_t>>(p), UInt32) << 16;
  return reinterpret_cast<Vec>(bits);
}
MDKV_INLINE Vec load_elements(const Half* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
// The first n elements, then zeros.
template <typename E>
MDKV_INLINE Vec load_first(const E* p, int n) {
  Vec v = set1(0.0f);
  for (int i = 0; i < kWidth && i < n; ++i) v[i] = to_float(p[i]);
  return v;
}
template <typename E>
MDKV_INLINE void store_elements(E* p, Vec v) {
  for (int i = 0; i < kWidth; ++i) p[i] = from_float<E>(v[i]);
}

// Whole numbers below 256 as bytes.
MDKV_INLINE void store_codes(uint8_t* p, Vec v) {
  for (int i = 0; i < kWidth; ++i) p[i] = static_cast<uint8_t>(static_cast<int>(v[i]));
}
// Field `field` of the bytes at p, as floats.
template <int kBits>
MDKV_INLINE Vec load_codes(const uint8_t* p, int field) {
  const Int32 bytes = __builtin_convertvector(load_as<Lanes<uint8_t>>(p), Int32);
  return __builtin_convertvector((bytes >> (field * kBits)) & ((1 << kBits) - 1), Vec);
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

// Vectors of eight floats with AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "element.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

constexpr int kWidth = 8;
constexpr int kMaxVectors = 2;   // accumulators per query head that stay in registers
constexpr int kMaxDotGroup = 2;  // query heads whose dot products of four tokens do

using Vec = __m256;

MDKV_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

MDKV_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
MDKV_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
MDKV_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
MDKV_INLINE void store_first(float* p, Vec v, int n) { _mm256_maskstore_ps(p, first_lanes(n), v); }
MDKV_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
MDKV_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
MDKV_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
MDKV_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
MDKV_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
MDKV_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
MDKV_INLINE Vec abs(Vec v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
MDKV_INLINE Vec floor(Vec v) { return _mm256_floor_ps(v); }
MDKV_INLINE Vec nearest(Vec v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MDKV_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
MDKV_INLINE Vec blend_first(Vec v, Vec other, int n) {
  return _mm256_blendv_ps(other, v, _mm256_castsi256_ps(first_lanes(n)));
}

MDKV_INLINE float reduce_max(Vec v) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
MDKV_INLINE float reduce_add(Vec v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
MDKV_INLINE void reduce_add4(const Vec (&v)[4], float* sums) {
  const Vec pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

// Lanes below -126 give zero: a weight that small never shows.
MDKV_INLINE Vec exp2(Vec v) {
  const Vec in_range = _mm256_cmp_ps(v, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
  const Vec whole = _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec f = _mm256_sub_ps(v, whole);
  Vec p = _mm256_set1_ps(1.535336188e-4f);
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.339887440e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.618437357e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.550332471e-2f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.402264791e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.931472028e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
  p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  return _mm256_and_ps(p, in_range);
}

MDKV_INLINE __m128i load128(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
MDKV_INLINE Vec load_elements(const float* p) { return _mm256_loadu_ps(p); }
MDKV_INLINE Vec load_elements(const BFloat16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
}
MDKV_INLINE Vec load_elements(const Half* p) { return _mm256_cvtph_ps(load128(p)); }
// The first n elements, then zeros.
template <typename E>
MDKV_INLINE Vec load_first(const E* p, int n) {
  float lanes[kWidth] = {};
  for (int i = 0; i < kWidth && i < n; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}

MDKV_INLINE void store_elements(float* p, Vec v) { _mm256_storeu_ps(p, v); }
MDKV_INLINE void store_elements(Half* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
MDKV_INLINE void store_elements(BFloat16* p, Vec v) {
  float lanes[kWidth];
  store(lanes, v);
  for (int i = 0; i < kWidth; ++i) p[i] = from_float<BFloat16>(lanes[i]);
}

// Whole numbers below 256 as bytes.
MDKV_INLINE void store_codes(uint8_t* p, Vec v) {
  const __m256i whole = _mm256_cvtps_epi32(v);
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
// Field `field` of the bytes at p, as floats.
template <int kBits>
MDKV_INLINE Vec load_codes(const uint8_t* p, int field) {
  __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  if constexpr (kBits < 8) {
    bytes = _mm256_srl_epi32(bytes, _mm_cvtsi32_si128(field * kBits));
    bytes = _mm256_and_si256(bytes, _mm256_set1_epi32((1 << kBits) - 1));
  }
  return _mm256_cvtepi32_ps(bytes);
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

// Vectors of sixteen floats with AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "element.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

constexpr int kWidth = 16;
constexpr int kMaxVectors = 4;   // accumulators per query head that stay in registers
constexpr int kMaxDotGroup = 4;  // query heads whose dot products of four tokens do

using Vec = __m512;

MDKV_INLINE __mmask16 first_lanes(int n) {
  return n >= kWidth ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << n) - 1);
}

MDKV_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
MDKV_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
MDKV_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
MDKV_INLINE void store_first(float* p, Vec v, int n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), v);
}
MDKV_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
MDKV_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
MDKV_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
MDKV_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
MDKV_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
MDKV_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
MDKV_INLINE Vec abs(Vec v) { return _mm512_abs_ps(v); }
MDKV_INLINE Vec floor(Vec v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
MDKV_INLINE Vec nearest(Vec v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MDKV_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
MDKV_INLINE Vec blend_first(Vec v, Vec other, int n) {
  return _mm512_mask_blend_ps(first_lanes(n), other, v);
}

MDKV_INLINE float reduce_max(Vec v) { return _mm512_reduce_max_ps(v); }
MDKV_INLINE float reduce_add(Vec v) { return _mm512_reduce_add_ps(v); }
MDKV_INLINE void reduce_add4(const Vec (&v)[4], float* sums) {
  const Vec ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const Vec cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const Vec lanes = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

MDKV_INLINE Vec exp2(Vec v) {
  // The clamp turns minus infinity into a number whose power of two is still zero.
  v = _mm512_max_ps(_mm512_set1_ps(-200.0f), v);
  const Vec whole = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec f = _mm512_sub_ps(v, whole);
  Vec p = _mm512_set1_ps(1.535336188e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.339887440e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618437357e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550332471e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402264791e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931472028e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

MDKV_INLINE __m128i load128(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
MDKV_INLINE __m256i load256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
MDKV_INLINE Vec load_elements(const float* p) { return _mm512_loadu_ps(p); }
MDKV_INLINE Vec load_elements(const BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(p)), 16));
}
MDKV_INLINE Vec load_elements(const Half* p) { return _mm512_cvtph_ps(load256(p)); }
// The first n elements, then zeros.
MDKV_INLINE __mmask16 clamped_lanes(int n) { return first_lanes(n < 0 ? 0 : n); }
MDKV_INLINE Vec load_first(const float* p, int n) {
  return _mm512_maskz_loadu_ps(clamped_lanes(n), p);
}
MDKV_INLINE Vec load_first(const BFloat16* p, int n) {
  const __m256i bits = _mm256_maskz_loadu_epi16(clamped_lanes(n), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
MDKV_INLINE Vec load_first(const Half* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(clamped_lanes(n), p));
}

MDKV_INLINE void store_elements(float* p, Vec v) { _mm512_storeu_ps(p, v); }
MDKV_INLINE void store_elements(Half* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
MDKV_INLINE void store_elements(BFloat16* p, Vec v) {
  float lanes[kWidth];
  store(lanes, v);
  for (int i = 0; i < kWidth; ++i) p[i] = from_float<BFloat16>(lanes[i]);
}

// Whole numbers below 256 as bytes.
MDKV_INLINE void store_codes(uint8_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
// Field `field` of the bytes at p, as floats.
template <int kBits>
MDKV_INLINE Vec load_codes(const uint8_t* p, int field) {
  __m512i bytes = _mm512_cvtepu8_epi32(load128(p));
  if constexpr (kBits < 8) {
    bytes = _mm512_srl_epi32(bytes, _mm_cvtsi32_si128(field * kBits));
    bytes = _mm512_and_si512(bytes, _mm512_set1_epi32((1 << kBits) - 1));
  }
  return _mm512_cvtepi32_ps(bytes);
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

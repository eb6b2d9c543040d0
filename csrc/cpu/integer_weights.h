// Float weights as integers of two signed bytes, for integer dot products with codes.
#pragma once

#include "decode_scratch.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

// Largest |256 * high + low| with both in a signed byte. Fifteen bits: finer than the codes by far.
constexpr float kLargestWeight = 32639.0f;

// weights[i] ~ step * (256 * high[i] + low[i]). Returns step; the integers' sum goes to `sum`.
//
// weights: [count], padded with zeros to whole vectors of 16, as are high and low.
MDKV_INLINE float split_weights(const float* weights, int64_t count, int8_t* high, int8_t* low,
                                float* sum) {
  __m512 top = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_loadu_ps(weights + i)));
  }
  const float largest = _mm512_reduce_max_ps(top);
  const __m512 scale = _mm512_set1_ps(largest > 1e-30f ? kLargestWeight / largest : 0.0f);
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(weights + i), scale));
    const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
    total = _mm512_add_epi32(total, whole);
    // Truncation keeps the low byte, which is what is left of `whole` beside 256 * upper.
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high + i), _mm512_cvtepi32_epi8(upper));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low + i), _mm512_cvtepi32_epi8(whole));
  }
  *sum = static_cast<float>(_mm512_reduce_add_epi32(total));
  return largest / kLargestWeight;
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

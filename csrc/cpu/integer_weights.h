// Float weights as integers of two signed bytes, for integer dot products with codes.
#pragma once

#include "decode_scratch.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

// Largest |256 * high + low| with both in a signed byte. Fifteen bits: finer than the codes by far.
constexpr float kLargestWeight = 32639.0f;

// Splits weights[i] ~ step * (256 * high[i] + low[i]) and returns the integers' sum.
//
// weights: [count], count a multiple of 16. inverse_step: 1 / step, or 0 where all are zero.
MDKV_INLINE float split_weights(const float* weights, int64_t count, float inverse_step,
                                int8_t* high, int8_t* low) {
  // Of w + 128, the second byte is `high`, and the first differs from `low` in its top bit.
  alignas(64) static constexpr uint8_t kBytes[64] = {
      1,  5,  9,  13, 17, 21, 25, 29, 33, 37,  41,  45,  49,  53,  57,  61,
      65, 69, 73, 77, 81, 85, 89, 93, 97, 101, 105, 109, 113, 117, 121, 125,
      0,  4,  8,  12, 16, 20, 24, 28, 32, 36,  40,  44,  48,  52,  56,  60,
      64, 68, 72, 76, 80, 84, 88, 92, 96, 100, 104, 108, 112, 116, 120, 124};
  const __m512i index = _mm512_load_si512(kBytes);
  const __m512i flip = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(-128), 1);
  const __m512 scale = _mm512_set1_ps(inverse_step), offset = _mm512_set1_ps(128.0f);
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 32) {
    const bool both = i + 16 < count;
    const __m512i first =
        _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_loadu_ps(weights + i), scale, offset));
    const __m512i second =
        both ? _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_loadu_ps(weights + i + 16), scale, offset))
             : _mm512_set1_epi32(128);
    total = _mm512_add_epi32(total, _mm512_add_epi32(first, second));
    const __m512i bytes = _mm512_xor_si512(_mm512_permutex2var_epi8(first, index, second), flip);
    const __m256i upper = _mm512_castsi512_si256(bytes),
                  lower = _mm512_extracti64x4_epi64(bytes, 1);
    if (both) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + i), upper);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + i), lower);
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(high + i), _mm256_castsi256_si128(upper));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(low + i), _mm256_castsi256_si128(lower));
    }
  }
  const int64_t rounded = round_up(count, 32);
  return static_cast<float>(_mm512_reduce_add_epi32(total) - 128 * static_cast<int32_t>(rounded));
}

// The largest magnitude of count weights, a multiple of 16.
MDKV_INLINE float largest_weight(const float* weights, int64_t count) {
  __m512 top = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_loadu_ps(weights + i)));
  }
  return _mm512_reduce_max_ps(top);
}

MDKV_INLINE float inverse_step(float largest) {
  return largest > 1e-30f ? kLargestWeight / largest : 0.0f;
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

// Scales and codes of vectors; mdkv_vllm/core/quantize.py is the specification.
#pragma once

#include "element.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

MDKV_INLINE Vec load_row(const float* row, int d, int rank) {
  return rank - d >= kWidth ? load(row + d) : load_first(row + d, rank - d);
}

// Code of each element, less the code that stands for zero.
template <int kBits>
MDKV_INLINE Vec centred_codes(Vec vector, Vec step) {
  constexpr float kHalf = static_cast<float>(1 << (kBits - 1));
  const Vec ratio = div(vector, step);
  if constexpr (kBits == 8) return min(max(nearest(ratio), set1(-127.0f)), set1(127.0f));
  return add(min(max(floor(ratio), set1(-kHalf)), set1(kHalf - 1.0f)), set1(0.5f));
}

MDKV_INLINE float rounded_to_bf16(float x) { return to_float(from_float<BFloat16>(x)); }

template <int kBits>
MDKV_INLINE float scale_of(const float* row, int rank) {
  Vec largest = set1(0.0f), squares = set1(0.0f);
  for (int d = 0; d < rank; d += kWidth) {
    const Vec x = load_row(row, d, rank);
    largest = max(largest, abs(x));
    squares = fma(x, x, squares);
  }
  if constexpr (kBits == 8) {
    // Nudged up so that rounding to bf16 never clips the largest element.
    return rounded_to_bf16(reduce_max(largest) * static_cast<float>(1.00390625 / 127.0));
  }
  const float rms = __builtin_sqrtf(reduce_add(squares) / static_cast<float>(rank));
  // Steps of the uniform quantizer with least squared error for a unit Gaussian.
  const Vec step = max(set1(rms * (kBits == 4 ? 0.3352f : 0.9957f)), set1(1e-30f));
  Vec dot = set1(0.0f), norm = set1(0.0f);
  for (int d = 0; d < rank; d += kWidth) {
    const Vec x = load_row(row, d, rank);
    Vec level = centred_codes<kBits>(x, step);
    if (rank - d < kWidth) level = blend_first(level, set1(0.0f), rank - d);
    dot = fma(x, level, dot);
    norm = fma(level, level, norm);
  }
  return rounded_to_bf16(reduce_add(dot) / reduce_add(norm));
}

// Codes of one vector; returns its scale.
template <int kBits>
MDKV_INLINE float quantize(const float* row, int rank, uint8_t* codes) {
  constexpr float kZero = static_cast<float>(1 << (kBits - 1)) - (kBits == 8 ? 0.0f : 0.5f);
  const float scale = scale_of<kBits>(row, rank);
  const Vec step = max(set1(scale), set1(1e-30f));
  for (int d = 0; d < rank; d += kWidth) {
    const Vec code = add(centred_codes<kBits>(load_row(row, d, rank), step), set1(kZero));
    uint8_t bytes[kWidth];
    store_codes(rank - d >= kWidth ? codes + d : bytes, code);
    if (rank - d < kWidth) __builtin_memcpy(codes + d, bytes, rank - d);
  }
  return scale;
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

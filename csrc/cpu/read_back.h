// Vectors as their codes will be read back; mdkv_vllm/core/quantise.py is the specification.
#pragma once

#include "kernels.h"

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
  // Steps of the uniform quantiser with least squared error for a unit Gaussian.
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

template <int kBits>
MDKV_INLINE void read_back_rows(const ReadBack& args) {
  for (int64_t t = 0; t < args.count; ++t) {
    const float* row = args.rows + t * args.stride;
    const float scale = scale_of<kBits>(row, args.rank);
    const Vec step = max(set1(scale), set1(1e-30f));
    Vec squares = set1(0.0f);
    for (int d = 0; d < args.rank; d += kWidth) {
      const Vec x = load_row(row, d, args.rank);
      const Vec read = mul(centred_codes<kBits>(x, step), set1(scale));
      const int left = args.rank - d;
      if (args.read != nullptr) {
        float* out = args.read + t * args.rank + d;
        left < kWidth ? store_first(out, read, left) : store(out, read);
      }
      Vec error = sub(x, read);
      if (left < kWidth) error = blend_first(error, set1(0.0f), left);
      squares = fma(error, error, squares);
    }
    if (args.error != nullptr) args.error[t] = reduce_add(squares);
  }
}

void read_back(const ReadBack& args) {
  if (args.bits == 8) read_back_rows<8>(args);
  if (args.bits == 4) read_back_rows<4>(args);
  if (args.bits == 2) read_back_rows<2>(args);
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

// Packs one list into pages; mdkv_vllm/core/packing.py and quantise.py are the specification.
#pragma once

#include "convert.h"
#include "kernels.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

// Steps of the uniform quantiser with least squared error for a unit Gaussian.
constexpr float kGaussianStep4 = 0.3352f;
constexpr float kGaussianStep2 = 0.9957f;
constexpr float kTiny = 1e-30f;

MDKV_INLINE float at_least(float x, float bound) { return x < bound ? bound : x; }
MDKV_INLINE float clamp(float x, float low, float high) {
  return x < low ? low : x > high ? high : x;
}

// Codes of one vector; returns the bits of its bf16 scale.
MDKV_INLINE uint16_t quantise_int8(const float* vector, int rank, uint8_t* codes) {
  float largest = 0.0f;
  for (int d = 0; d < rank; ++d) largest = at_least(largest, __builtin_fabsf(vector[d]));
  // Nudged up so that rounding to bf16 never clips the largest element.
  const BFloat16 scale = from_float<BFloat16>(largest * static_cast<float>(1.00390625 / 127.0));
  const float step = at_least(to_float(scale), kTiny);
  for (int d = 0; d < rank; ++d) {
    const float code = clamp(__builtin_rintf(vector[d] / step), -127.0f, 127.0f);
    codes[d] = static_cast<uint8_t>(static_cast<int>(code) + 128);
  }
  return scale.bits;
}

// Nearest of the levels .. -1.5, -0.5, 0.5, 1.5 .. in units of a step, less one half.
MDKV_INLINE float mid_rise(float x, float step, float half) {
  return clamp(__builtin_floorf(x / step), -half, half - 1.0f);
}

template <int kBits>
MDKV_INLINE uint16_t quantise_gaussian(const float* vector, int rank, uint8_t* codes) {
  constexpr float kHalf = static_cast<float>(1 << (kBits - 1));
  double squares = 0.0;
  for (int d = 0; d < rank; ++d) squares += static_cast<double>(vector[d]) * vector[d];
  const float rms = __builtin_sqrtf(static_cast<float>(squares / rank));
  const float step = at_least(rms * (kBits == 4 ? kGaussianStep4 : kGaussianStep2), kTiny);
  double dot = 0.0, norm = 0.0;
  for (int d = 0; d < rank; ++d) {
    const double level = mid_rise(vector[d], step, kHalf) + 0.5f;
    dot += vector[d] * level;
    norm += level * level;
  }
  const BFloat16 scale = from_float<BFloat16>(static_cast<float>(dot / norm));
  const float refit = at_least(to_float(scale), kTiny);
  for (int d = 0; d < rank; ++d) {
    codes[d] = static_cast<uint8_t>(mid_rise(vector[d], refit, kHalf) + kHalf);
  }
  return scale.bits;
}

MDKV_INLINE uint16_t quantise(const float* vector, int rank, int bits, uint8_t* codes) {
  if (bits == 8) return quantise_int8(vector, rank, codes);
  return bits == 4 ? quantise_gaussian<4>(vector, rank, codes)
                   : quantise_gaussian<2>(vector, rank, codes);
}

// One page of codes. codes: scratch [tokens_per_page, rank].
inline void pack_codes(const PackArgs& args, const float* keys, const float* values, int count,
                       uint8_t* codes, uint8_t* page) {
  const Format& format = args.format;
  const int rank = format.rank, capacity = format.tokens_per_page, per_byte = 8 / format.bits;
  auto* scales = reinterpret_cast<uint16_t*>(page + 2 * format.section_bytes);
  __builtin_memset(codes, 0, int64_t{capacity} * rank);
  for (int t = 0; t < count; ++t) {
    scales[t] = quantise(keys + int64_t{t} * rank, rank, format.bits, codes + int64_t{t} * rank);
  }
  const int run = capacity / per_byte;
  for (int field = 0; field < per_byte; ++field) {
    for (int j = 0; j < run; ++j) {
      const uint8_t* from = codes + int64_t{field * run + j} * rank;
      for (int d = 0; d < rank; ++d) {
        page[int64_t{d} * run + j] |= static_cast<uint8_t>(from[d] << (field * format.bits));
      }
    }
  }
  const int row_bytes = rank / per_byte;
  for (int t = 0; t < count; ++t) {
    scales[capacity + t] = quantise(values + int64_t{t} * rank, rank, format.bits, codes);
    uint8_t* row = page + format.section_bytes + int64_t{t} * row_bytes;
    for (int field = 0; field < per_byte; ++field) {
      for (int j = 0; j < row_bytes; ++j) {
        row[j] |= static_cast<uint8_t>(codes[field * row_bytes + j] << (field * format.bits));
      }
    }
  }
}

// One page of elements, keys dimension-major.
template <typename E>
inline void pack_elements(const PackArgs& args, const float* keys, const float* values, int count,
                          uint8_t* page) {
  const int rank = args.format.rank, capacity = args.format.tokens_per_page;
  E* key_rows = reinterpret_cast<E*>(page);
  for (int t = 0; t < count; ++t) {
    for (int d = 0; d < rank; ++d) {
      key_rows[int64_t{d} * capacity + t] = from_float<E>(keys[int64_t{t} * rank + d]);
    }
  }
  convert(values, Element::kFloat32, page + args.format.section_bytes, args.element,
          int64_t{count} * rank);
}

// One page of the cache's own slots.
inline void pack_slots(const PackArgs& args, const float* keys, const float* values, int count,
                       uint8_t* page) {
  const int64_t rank = args.format.rank, half = rank * element_bytes(args.element);
  for (int t = 0; t < count; ++t, page += 2 * half) {
    convert(keys + t * rank, Element::kFloat32, page, args.element, rank);
    convert(values + t * rank, Element::kFloat32, page + half, args.element, rank);
  }
}

inline void pack_list(const PackArgs& args, const float* keys, const float* values, int64_t tokens,
                      uint8_t* codes, uint8_t* pages) {
  const int64_t capacity = args.format.tokens_per_page, rank = args.format.rank;
  for (int64_t t = 0; t < tokens; t += capacity, pages += args.page_bytes) {
    const int count = static_cast<int>(tokens - t < capacity ? tokens - t : capacity);
    const float* k = keys + t * rank;
    const float* v = values + t * rank;
    __builtin_memset(pages, 0, args.page_bytes);
    if (args.format.codes) {
      pack_codes(args, k, v, count, codes, pages);
    } else if (args.token_major) {
      pack_slots(args, k, v, count, pages);
    } else if (args.element == Element::kFloat32) {
      pack_elements<float>(args, k, v, count, pages);
    } else if (args.element == Element::kBFloat16) {
      pack_elements<BFloat16>(args, k, v, count, pages);
    } else {
      pack_elements<Half>(args, k, v, count, pages);
    }
  }
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

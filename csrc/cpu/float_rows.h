// Sums of rows weighted per query head, in floats: acc[g][x] += sum_r weight[g][r] * row_r[x].
//
// Values (token-major) are such rows, and so are dimension-major keys: their rows are dimensions,
// their weights a query.
#pragma once

#include "group_blocks.h"
#include "prefetch.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

// How a row's vectors are read: elements of a type, or one field of packed codes.
template <typename E>
struct Elements {
  static constexpr bool kCodes = false;
  static constexpr int kVectorBytes = kWidth * sizeof(E);
  static constexpr int kFields = 1;
  MDKV_INLINE static Vec at(const uint8_t* row, int position, int) {
    return load_elements(reinterpret_cast<const E*>(row) + position);
  }
};
template <int kBits>
struct Codes {
  static constexpr bool kCodes = true;
  static constexpr int kVectorBytes = kWidth;
  static constexpr int kFields = 8 / kBits;
  MDKV_INLINE static Vec at(const uint8_t* row, int position, int field) {
    return load_codes<kBits>(row + position, field);
  }
};

template <typename Reader, int kGroup, int kVectors>
MDKV_INLINE void add_rows(Vec (&acc)[kGroup][kVectors], const uint8_t* row, int64_t stride,
                          int count, int position, int field, const float* weights,
                          int64_t weights_stride, Prefetcher& prefetcher,
                          int64_t weights_step = 1) {
  constexpr int kLines = (kVectors * Reader::kVectorBytes + 63) / 64;
  for (int r = 0; r < count; ++r, row += stride) {
    prefetcher.step(kLines);
    Vec x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = Reader::at(row, position + v * kWidth, field);
    for (int g = 0; g < kGroup; ++g) {
      const Vec weight = set1(weights[g * weights_stride + r * weights_step]);
      for (int v = 0; v < kVectors; ++v) acc[g][v] = fma(weight, x[v], acc[g][v]);
    }
  }
}

// Calls body(Int<vectors>, first position) over a row of `width` positions.
template <typename Body>
MDKV_INLINE void for_positions(int width, Body body) {
  for_blocks<kMaxVectors>((width + kWidth - 1) / kWidth,
                          [&](auto vectors, int first) { body(vectors, first * kWidth); });
}

// out[g][j] += sum_i coefficients[g][i] * matrix[i][j], for a float matrix [rows, columns] that
// must not be over-read.
inline void add_product(const float* matrix, int rows, int columns, const float* coefficients,
                        int64_t coefficients_stride, int group, float* out, int64_t out_stride) {
  const int whole = columns / kWidth * kWidth;
  Prefetcher none(nullptr, nullptr, 0);
  for_positions(whole, [&](auto vectors, int position) {
    for_blocks<kMaxGroup>(group, [&](auto heads, int g0) {
      constexpr int kGroup = decltype(heads)::value, kVectors = decltype(vectors)::value;
      Vec acc[kGroup][kVectors];
      for (int g = 0; g < kGroup; ++g) {
        for (int v = 0; v < kVectors; ++v) {
          acc[g][v] = load(out + (g0 + g) * out_stride + position + v * kWidth);
        }
      }
      add_rows<Elements<float>>(acc, reinterpret_cast<const uint8_t*>(matrix),
                                columns * int64_t{sizeof(float)}, rows, position, 0,
                                coefficients + g0 * coefficients_stride, coefficients_stride, none);
      for (int g = 0; g < kGroup; ++g) {
        for (int v = 0; v < kVectors; ++v) {
          store(out + (g0 + g) * out_stride + position + v * kWidth, acc[g][v]);
        }
      }
    });
  });
  for (int j = whole; j < columns; ++j) {
    for (int g = 0; g < group; ++g) {
      float sum = out[g * out_stride + j];
      for (int i = 0; i < rows; ++i) {
        sum += coefficients[g * coefficients_stride + i] * matrix[int64_t{i} * columns + j];
      }
      out[g * out_stride + j] = sum;
    }
  }
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

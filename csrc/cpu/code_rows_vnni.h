// Weighted sums of packed code rows in integers: four rows and 64 codes per instruction.
//
// Keys (rows are dimensions, weights a query) and values (rows are tokens, weights a softmax) are
// the same sum. Codes are never converted: a field is masked where it lies, which multiplies it by
// a power of two that the caller takes back.
#pragma once

#include "group_blocks.h"
#include "prefetch.h"
#include "row_interleave.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

MDKV_INLINE __m512i broadcast4(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

// sums[i] += dot product of four codes and four weights. As an intrinsic GCC 12 would copy every
// sum twice in the innermost loop.
MDKV_INLINE __m512i dot4(__m512i sums, __m512i codes, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(weights));
  return sums;
}

// Sums of kGroup query heads over two vectors: 32 positions of whole bytes, or 16 positions of two
// neighbouring fields. More would not stay in registers.
template <int kBits, int kBlocks, int kGroup>
struct CodeSums {
  static constexpr int kFields = kBits == 8 ? 1 : 2;
  static constexpr int kVectors = kBlocks * kFields;

  int first_field;
  __m512i high[kGroup][kVectors] = {};
  __m512i low[kGroup][kVectors] = {};

  explicit MDKV_INLINE CodeSums(int field) : first_field(field) {}

  // Adds `count` rows; weights up to the next multiple of four must be zero.
  template <RowSpread kSpread>
  MDKV_INLINE void add(const RowInterleave<kSpread, kBlocks>& interleave, const uint8_t* row,
                       int count, const int8_t* weights_high, const int8_t* weights_low,
                       int64_t weights_stride, Prefetcher& prefetcher) {
    const __m512i mask = field_mask(first_field), next_mask = field_mask(first_field + 1);
    for (int r = 0; r < count; r += 4, row += 4 * interleave.row_bytes()) {
      prefetcher.step(kBlocks);
      __m512i codes[2];
      interleave.load(row, codes);
      if constexpr (kFields == 2) {
        codes[1] = _mm512_and_si512(codes[0], next_mask);
        codes[0] = _mm512_and_si512(codes[0], mask);
      }
      for (int g = 0; g < kGroup; ++g) {
        const __m512i upper = broadcast4(weights_high + g * weights_stride + r);
        const __m512i lower = broadcast4(weights_low + g * weights_stride + r);
        for (int v = 0; v < kVectors; ++v) {
          high[g][v] = dot4(high[g][v], codes[v], upper);
          low[g][v] = dot4(low[g][v], codes[v], lower);
        }
      }
    }
  }

  // Calls body(vector, block, field) for each vector that starts within a row's bytes.
  template <typename Body>
  MDKV_INLINE void for_vectors(int bytes_left, Body body) const {
    for (int block = 0; block < kBlocks && 16 * block < bytes_left; ++block) {
      for (int field = 0; field < kFields; ++field) {
        body(block * kFields + field, block, first_field + field);
      }
    }
  }

  // A vector of sums in units of a weight's step times a code.
  MDKV_INLINE __m512 total(int g, int vector, int field) const {
    const float unit = 1.0f / static_cast<float>(1 << (field * (kBits % 8)));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[g][vector]), _mm512_set1_ps(256.0f * unit),
                           _mm512_mul_ps(_mm512_cvtepi32_ps(low[g][vector]), _mm512_set1_ps(unit)));
  }

 private:
  MDKV_INLINE static __m512i field_mask(int field) {
    return _mm512_set1_epi8(static_cast<char>(((1 << kBits) - 1) << (field * (kBits % 8))));
  }
};

// Calls body(interleave, Int<heads>, first head, Int<blocks>, first field) with what suits rows of
// that length, for every head and field.
template <int kBits, typename Body>
MDKV_INLINE void for_code_blocks(int64_t row_bytes, int group, Body body) {
  const auto for_heads = [&](auto interleave, auto blocks) {
    for (int field = 0; field < 8 / kBits; field += 2) {
      for_blocks<4>(group, [&](auto heads, int g0) { body(interleave, heads, g0, blocks, field); });
    }
  };
  constexpr int kBlocks = kBits == 8 ? 2 : 1;
  switch (row_spread(row_bytes)) {
    case RowSpread::kFour:
      return for_heads(RowInterleave<RowSpread::kFour, 1>(row_bytes), Int<1>{});
    case RowSpread::kTwo:
      return for_heads(RowInterleave<RowSpread::kTwo, kBlocks>(row_bytes), Int<kBlocks>{});
    case RowSpread::kOne:
      return for_heads(RowInterleave<RowSpread::kOne, kBlocks>(row_bytes), Int<kBlocks>{});
  }
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

// Weighted sums of packed code rows in integers: four rows and 64 codes per instruction.
//
// Keys (rows are dimensions, weights a query) and values (rows are tokens, weights a softmax) are
// the same sum. Codes are never converted: a field is masked where it lies, which multiplies it by
// a power of two that the caller takes back.
#pragma once

#include "group_blocks.h"
#include "integer_weights.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

// Puts the bytes of four rows that belong to one position side by side.
class RowInterleave {
 public:
  explicit RowInterleave(int64_t row_bytes) : row_bytes_(row_bytes), packed_(row_bytes <= 16) {
    alignas(64) uint8_t index[64];
    for (int i = 0; i < 64; ++i) {
      index[i] = static_cast<uint8_t>((i & 3) * (packed_ ? row_bytes : 16) + (i >> 2));
    }
    index_ = _mm512_load_si512(index);
  }

  template <bool kPacked>
  MDKV_INLINE __m512i load(const uint8_t* row) const {
    __m512i rows;
    if constexpr (kPacked) {
      rows = _mm512_loadu_si512(row);
    } else {
      const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(load128(row)),
                                                  load128(row + row_bytes_), 1);
      const __m256i high = _mm256_inserti128_si256(
          _mm256_castsi128_si256(load128(row + 2 * row_bytes_)), load128(row + 3 * row_bytes_), 1);
      rows = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    return _mm512_permutexvar_epi8(index_, rows);
  }
  bool packed() const { return packed_; }
  int64_t row_bytes() const { return row_bytes_; }

 private:
  int64_t row_bytes_;
  bool packed_;
  __m512i index_;
};

MDKV_INLINE __m512i broadcast4(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

template <int kBits>
struct CodeSums {
  static constexpr int kFields = 8 / kBits;
  static constexpr int kMaxHeads = kBits == 2 ? 3 : 4;
};

// high[g][field] += sums over `count` rows (weights beyond are zero) at 16 positions.
template <int kBits, bool kPacked, int kGroup>
MDKV_INLINE void add_code_rows(__m512i (&high)[kGroup][8 / kBits],
                               __m512i (&low)[kGroup][8 / kBits], const RowInterleave& interleave,
                               const uint8_t* row, int count, const int8_t* weights_high,
                               const int8_t* weights_low, int64_t weights_stride) {
  for (int r = 0; r < count; r += 4, row += 4 * interleave.row_bytes()) {
    const __m512i bytes = interleave.load<kPacked>(row);
    for (int field = 0; field < 8 / kBits; ++field) {
      const __m512i codes =
          kBits == 8 ? bytes
                     : _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(
                                                   ((1 << kBits) - 1) << (field * kBits))));
      for (int g = 0; g < kGroup; ++g) {
        const int64_t at = g * weights_stride + r;
        high[g][field] = _mm512_dpbusd_epi32(high[g][field], codes, broadcast4(weights_high + at));
        low[g][field] = _mm512_dpbusd_epi32(low[g][field], codes, broadcast4(weights_low + at));
      }
    }
  }
}

// The sums as floats, in units of a weight's step times a code.
template <int kBits>
MDKV_INLINE __m512 combine(__m512i high, __m512i low, int field) {
  const float unit = 1.0f / static_cast<float>(1 << (field * kBits));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f * unit),
                         _mm512_mul_ps(_mm512_cvtepi32_ps(low), _mm512_set1_ps(unit)));
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

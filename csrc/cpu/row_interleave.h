// Puts the bytes of four code rows that belong to one position side by side.
#pragma once

#include "decode_args.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

// Short rows share a load: four of up to 16 bytes, or two of up to 32.
enum class RowSpread { kFour, kTwo, kOne };

MDKV_INLINE RowSpread row_spread(int64_t row_bytes) {
  return row_bytes <= 16 ? RowSpread::kFour : row_bytes <= 32 ? RowSpread::kTwo : RowSpread::kOne;
}

// kBlocks: blocks of 16 positions that are read at a time, 1 or 2.
template <RowSpread kSpread, int kBlocks>
class RowInterleave {
 public:
  explicit RowInterleave(int64_t row_bytes) : row_bytes_(row_bytes) {
    // Where row r lies in the two registers that are permuted.
    const int64_t near = kSpread == RowSpread::kOne ? 16 * kBlocks : row_bytes;
    constexpr bool kOneRegister = kSpread == RowSpread::kFour || kBlocks * 16 * 4 <= 64;
    for (int block = 0; block < kBlocks; ++block) {
      alignas(64) uint8_t index[64];
      for (int i = 0; i < 64; ++i) {
        const int64_t row = i & 3;
        const int64_t start = kOneRegister && kSpread != RowSpread::kTwo
                                  ? row * near
                                  : (row >> 1) * 64 + (row & 1) * near;
        index[i] = static_cast<uint8_t>(start + (i >> 2) + 16 * block);
      }
      index_[block] = _mm512_load_si512(index);
    }
  }

  // out[b], byte 4 * i + r: position 16 * b + i of row r.
  MDKV_INLINE void load(const uint8_t* row, __m512i* out) const {
    if constexpr (kSpread == RowSpread::kFour) {
      out[0] = _mm512_permutexvar_epi8(index_[0], _mm512_loadu_si512(row));
    } else if constexpr (kSpread == RowSpread::kOne && kBlocks == 1) {
      const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(load128(row)),
                                                  load128(row + row_bytes_), 1);
      const __m256i high = _mm256_inserti128_si256(
          _mm256_castsi128_si256(load128(row + 2 * row_bytes_)), load128(row + 3 * row_bytes_), 1);
      const __m512i rows = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
      out[0] = _mm512_permutexvar_epi8(index_[0], rows);
    } else {
      const __m512i low = load_two(row), high = load_two(row + 2 * row_bytes_);
      for (int block = 0; block < kBlocks; ++block) {
        out[block] = _mm512_permutex2var_epi8(low, index_[block], high);
      }
    }
  }
  MDKV_INLINE int64_t row_bytes() const { return row_bytes_; }

 private:
  MDKV_INLINE __m512i load_two(const uint8_t* row) const {
    if constexpr (kSpread == RowSpread::kTwo) return _mm512_loadu_si512(row);
    return _mm512_inserti64x4(_mm512_castsi256_si512(load256(row)), load256(row + row_bytes_), 1);
  }

  int64_t row_bytes_;
  __m512i index_[kBlocks];
};

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

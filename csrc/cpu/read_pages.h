// Kept tokens back in the model's space; mdkv_vllm/core/reference.py (read_lease) is the
// specification.
#pragma once

#include "convert.h"
#include "float_rows.h"
#include "lease.h"
#include "read_scratch.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

// Rows of elements, or of codes less the code for zero, as floats [rows, stride].
template <typename Reader>
inline void unpack_rows(const uint8_t* row, int64_t row_bytes, int rows, int columns, float zero,
                        float* out, int64_t stride) {
  const int run = columns / Reader::kFields;
  for (int r = 0; r < rows; ++r, row += row_bytes, out += stride) {
    // What is written behind a field's end is the beginning of the next, written later.
    for (int field = 0; field < Reader::kFields; ++field) {
      for (int at = 0; at < run; at += kWidth) {
        store(out + field * run + at, sub(Reader::at(row, at, field), set1(zero)));
      }
    }
  }
}

// Reads runs of pages of one source.
class PageReader {
 public:
  PageReader(const ReadArgs& args, const Source& source, ReadScratch& scratch)
      : args_(args), cache_(args.cache), source_(source), scratch_(scratch) {}

  // Pages [begin, end), counted through the lists.
  void read(int64_t begin, int64_t end) const {
    if (source_.full_tokens > 0) {
      read_list(cache_.full, {source_.full_tokens, 0}, source_.target, begin, end);
      return;
    }
    int64_t target = source_.target;
    for (int f = 0; f < cache_.num_formats && end > 0; ++f) {
      const List& list = source_.lists[f];
      const int64_t pages = cache_.formats[f].pages(list.tokens);
      if (begin < pages) {
        read_list(cache_.formats[f], list, target, begin > 0 ? begin : 0,
                  end < pages ? end : pages);
      }
      target += list.tokens;
      begin -= pages, end -= pages;
    }
  }

 private:
  void read_list(const Format& format, const List& list, int64_t target, int64_t begin,
                 int64_t end) const {
    const int sides = format.slots() ? 1 : 2;
    for (int side = 0; side < sides; ++side) {
      if (!format.slots()) set_matrix(format, side);
      for (int64_t number = begin; number < end; ++number) {
        const int64_t first = number * format.tokens_per_page, rest = list.tokens - first;
        const int count =
            static_cast<int>(rest < format.tokens_per_page ? rest : format.tokens_per_page);
        const uint8_t* page = readable(page_at(list.first_page + number), format);
        if (format.slots()) {
          read_slots(format, page, count, target + first);
        } else {
          unpack(format, page, count, side);
          project(format, page, count, side, target + first);
        }
      }
    }
  }

  const uint8_t* page_at(int64_t page) const {
    if (source_.full_tokens == 0) return lease_page(cache_, source_.row, source_.first_block, page);
    const int64_t place = int64_t{cache_.layer} * cache_.num_kv_heads + source_.head;
    return cache_.block(source_.row, source_.first_block + page) + place * cache_.page_bytes;
  }

  // Whole vectors are read, and the cache may end with the page.
  const uint8_t* readable(const uint8_t* page, const Format& format) const {
    if (format.slots() || page + cache_.page_bytes + kOverread <= cache_.kv_cache_end) return page;
    __builtin_memcpy(scratch_.copy, page, cache_.page_bytes);
    __builtin_memset(scratch_.copy + cache_.page_bytes, 0, kOverread);
    return scratch_.copy;
  }

  char* row(int side, int64_t token) const {
    return (side ? args_.values : args_.keys) +
           token * cache_.head_size * element_bytes(args_.type);
  }

  void read_slots(const Format& format, const uint8_t* slot, int count, int64_t target) const {
    for (int t = 0; t < count; ++t, slot += 2 * format.values_offset) {
      for (int side = 0; side < 2; ++side) {
        convert(slot + side * format.values_offset, cache_.cache_type, row(side, target + t),
                args_.type, cache_.head_size);
      }
    }
  }

  // Directions of the format's space, [rank, padded_head]: what is behind a row's end is not used.
  void set_matrix(const Format& format, int side) const {
    const int64_t size = cache_.head_size, padded = cache_.padded_head();
    const float* from = cache_.hadamard;
    if (format.rotation == MDKV_BASIS) {
      from = (side ? cache_.basis_v : cache_.basis_k);
      if (cache_.prompt_basis) {
        read_prompt_basis(cache_, source_.row, source_.first_block, source_.head, side,
                          scratch_.basis);
        from = scratch_.basis;
      } else {
        from += int64_t{source_.head} * cache_.basis_rank * size;
      }
    }
    for (int64_t d = 0; d < format.rank; ++d) {
      __builtin_memcpy(scratch_.matrix + d * padded, from + d * size, size * sizeof(float));
    }
  }

  // Keys are unpacked by dimension, values by token.
  void unpack(const Format& format, const uint8_t* page, int count, int side) const {
    if (format.codes()) {
      if (format.bits == 8) unpack_side<Codes<8>>(format, page, count, side);
      if (format.bits == 4) unpack_side<Codes<4>>(format, page, count, side);
      if (format.bits == 2) unpack_side<Codes<2>>(format, page, count, side);
    } else if (cache_.cache_type == Element::kFloat32) {
      unpack_side<Elements<float>>(format, page, count, side);
    } else if (cache_.cache_type == Element::kBFloat16) {
      unpack_side<Elements<BFloat16>>(format, page, count, side);
    } else {
      unpack_side<Elements<Half>>(format, page, count, side);
    }
  }

  template <typename Reader>
  void unpack_side(const Format& format, const uint8_t* page, int count, int side) const {
    if (side == 0) {
      unpack_rows<Reader>(page, format.key_row_bytes(), format.rank, format.tokens_per_page,
                          format.zero(), scratch_.rows, ReadScratch::stride(format, side));
    } else {
      unpack_rows<Reader>(page + format.values_offset, format.value_row_bytes(), count, format.rank,
                          format.zero(), scratch_.rows, ReadScratch::stride(format, side));
    }
  }

  // Unpacked tokens times the matrix, and times their scales, into keys or values.
  void project(const Format& format, const uint8_t* page, int count, int side,
               int64_t target) const {
    const auto* scales = reinterpret_cast<const BFloat16*>(page + format.scales_offset) +
                         side * format.tokens_per_page;
    const int64_t padded = cache_.padded_head(), stride = ReadScratch::stride(format, side);
    const int64_t token_stride = side ? stride : 1, dim_stride = side ? 1 : stride;
    const auto* matrix = reinterpret_cast<const uint8_t*>(scratch_.matrix);
    Prefetcher none(nullptr, nullptr, 0);
    for_blocks<kMaxGroup>(count, [&](auto tokens, int t0) {
      constexpr int kTokens = decltype(tokens)::value;
      float factor[kTokens];
      for (int t = 0; t < kTokens; ++t) {
        factor[t] = format.codes() ? to_float(scales[t0 + t]) : 1.0f;
      }
      for_positions(static_cast<int>(padded), [&](auto vectors, int position) {
        constexpr int kVectors = decltype(vectors)::value;
        Vec acc[kTokens][kVectors];
        for (int t = 0; t < kTokens; ++t) {
          for (int v = 0; v < kVectors; ++v) acc[t][v] = set1(0.0f);
        }
        add_rows<Elements<float>>(acc, matrix, padded * int64_t{sizeof(float)}, format.rank,
                                  position, 0, scratch_.rows + t0 * token_stride, token_stride,
                                  none, dim_stride);
        for (int t = 0; t < kTokens; ++t) {
          for (int v = 0; v < kVectors; ++v) {
            store(scratch_.out + t * padded + position + v * kWidth,
                  mul(acc[t][v], set1(factor[t])));
          }
        }
      });
      for (int t = 0; t < kTokens; ++t) {
        convert(scratch_.out + t * padded, Element::kFloat32, row(side, target + t0 + t),
                args_.type, cache_.head_size);
      }
    });
  }

  const ReadArgs& args_;
  const DecodeArgs& cache_;
  const Source& source_;
  ReadScratch& scratch_;
};

inline void read_pages(const ReadArgs& args, const Source& source, int64_t begin, int64_t end,
                       ReadScratch& scratch) {
  PageReader(args, source, scratch).read(begin, end);
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

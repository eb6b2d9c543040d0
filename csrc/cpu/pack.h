// Packs one list into pages; mdkv_vllm/core/packing.py is the specification.
#pragma once

#include "convert.h"
#include "kernels.h"
#include "quantize.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

// Merges the codes that share a byte, which lie `apart` from each other, into `count` bytes.
template <int kBits>
MDKV_INLINE void merge_fields(const uint8_t* codes, int64_t apart, int count, uint8_t* bytes) {
  for (int i = 0; i < count; ++i) {
    int byte = 0;
    for (int field = 0; field < 8 / kBits; ++field) {
      byte |= codes[field * apart + i] << (field * (kBits % 8));
    }
    bytes[i] = static_cast<uint8_t>(byte);
  }
}

// One page of codes. codes: scratch [tokens_per_page, rank].
template <int kBits>
inline void pack_codes(const PackArgs& args, const float* keys, const float* values, int count,
                       uint8_t* codes, uint8_t* page) {
  const Format& format = args.format;
  const int rank = format.rank, capacity = format.tokens_per_page;
  auto* scales = reinterpret_cast<BFloat16*>(page + format.scales_offset);
  const int64_t size = int64_t{capacity} * rank, used = int64_t{count} * rank;
  for (int t = 0; t < count; ++t) {
    const int64_t at = int64_t{t} * rank;
    scales[t] = from_float<BFloat16>(quantize<kBits>(keys + at, rank, codes + at));
  }
  __builtin_memset(codes + used, 0, size - used);
  // A byte holds the same dimension of tokens that lie a run apart. Merging them first,
  // token-major, leaves the fewest bytes to transpose.
  const int run = capacity * kBits / 8;
  for (int j = 0; j < run; ++j) {
    uint8_t* row = codes + int64_t{j} * rank;
    merge_fields<kBits>(row, int64_t{run} * rank, rank, row);
    for (int d = 0; d < rank; ++d) page[int64_t{d} * run + j] = row[d];
  }
  const int row_bytes = rank * kBits / 8;
  for (int t = 0; t < count; ++t) {
    const float scale = quantize<kBits>(values + int64_t{t} * rank, rank, codes);
    scales[capacity + t] = from_float<BFloat16>(scale);
    merge_fields<kBits>(codes, row_bytes, row_bytes,
                        page + format.values_offset + int64_t{t} * row_bytes);
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
  convert(values, Element::kFloat32, page + args.format.values_offset, args.element,
          int64_t{count} * rank);
}

// One page of the cache's own slots.
inline void pack_slots(const PackArgs& args, const float* keys, const float* values, int count,
                       uint8_t* page) {
  const int64_t rank = args.format.rank, value = args.format.values_offset;
  for (int t = 0; t < count; ++t, page += 2 * value) {
    convert(keys + t * rank, Element::kFloat32, page, args.element, rank);
    convert(values + t * rank, Element::kFloat32, page + value, args.element, rank);
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
    if (args.format.codes()) {
      if (args.format.bits == 8) pack_codes<8>(args, k, v, count, codes, pages);
      if (args.format.bits == 4) pack_codes<4>(args, k, v, count, codes, pages);
      if (args.format.bits == 2) pack_codes<2>(args, k, v, count, codes, pages);
    } else if (args.format.slots()) {
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

// Scores and values of pages that hold elements (or, without VNNI, codes read as floats).
#pragma once

#include "float_rows.h"
#include "tile.h"
#include "token_dots.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

// Scores of token-major keys.
template <typename E>
inline void score_full(const DecodeArgs& args, const Tile& tile, const SpaceQuery& query,
                       TileScratch& scratch, Prefetcher& prefetcher) {
  const int64_t slot_bytes = 2 * args.head_size * int64_t{sizeof(E)};
  for (int i = 0; i < tile.num_pages; ++i) {
    dot_rows<E>(tile.page[i], slot_bytes, tile.count[i], query.exact, query.width, args.head_size,
                args.group, scratch.weights + i * tile.stride, scratch.tokens, prefetcher);
  }
}

// Scores of dimension-major keys. zero_dot: [group], for codes.
template <typename Reader>
inline void score_rows(const DecodeArgs& args, const Tile& tile, const SpaceQuery& query,
                       const float* zero_dot, TileScratch& scratch, Prefetcher& prefetcher) {
  const Format& format = *tile.format;
  const int run = format.tokens_per_page / Reader::kFields;
  const int64_t row_bytes = format.key_row_bytes();
  for (int i = 0; i < tile.num_pages; ++i) {
    const uint8_t* page = tile.page[i];
    const auto* scales = reinterpret_cast<const BFloat16*>(page + format.scales_offset);
    for (int field = 0; field < Reader::kFields; ++field) {
      for_positions(run, [&](auto vectors, int position) {
        for_blocks<kMaxGroup>(args.group, [&](auto heads, int g0) {
          constexpr int kGroup = decltype(heads)::value, kVectors = decltype(vectors)::value;
          Vec acc[kGroup][kVectors];
          for (int g = 0; g < kGroup; ++g) {
            for (int v = 0; v < kVectors; ++v) acc[g][v] = set1(0.0f);
          }
          add_rows<Reader>(acc, page, row_bytes, format.rank, position, field,
                           query.exact + g0 * query.width, query.width, prefetcher);
          for (int v = 0; v < kVectors; ++v) {
            const int offset = position + v * kWidth, token = field * run + offset;
            const int lanes = run - offset;
            for (int g = 0; g < kGroup; ++g) {
              Vec score = acc[g][v];
              if constexpr (Reader::kCodes) {
                score = mul(sub(score, set1(zero_dot[g0 + g])), load_elements(scales + token));
              }
              store_first(scratch.weights + (g0 + g) * scratch.tokens + i * tile.stride + token,
                          score, lanes < kWidth ? lanes : kWidth);
            }
          }
        });
      });
    }
  }
}

// Adds weighted value rows.
//
// offset: of the first value row in a page. out: [group, out_stride], `width` values of it.
template <typename Reader>
inline void add_values(const Tile& tile, int64_t offset, int64_t row_bytes, int width, int group,
                       bool centred, const TileScratch& scratch, float* out, int64_t out_stride,
                       Prefetcher& prefetcher) {
  const int run = width / Reader::kFields;
  for (int field = 0; field < Reader::kFields; ++field) {
    for_positions(run, [&](auto vectors, int position) {
      for_blocks<kMaxGroup>(group, [&](auto heads, int g0) {
        constexpr int kGroup = decltype(heads)::value, kVectors = decltype(vectors)::value;
        float* rows = out + g0 * out_stride + field * run + position;
        Vec acc[kGroup][kVectors];
        for (int g = 0; g < kGroup; ++g) {
          const Vec start = set1(centred ? -scratch.weight_sum[g0 + g] : 0.0f);
          for (int v = 0; v < kVectors; ++v) acc[g][v] = start;
        }
        for (int i = 0; i < tile.num_pages; ++i) {
          add_rows<Reader>(acc, tile.page[i] + offset, row_bytes, tile.count[i], position, field,
                           scratch.weights + g0 * scratch.tokens + i * tile.stride, scratch.tokens,
                           prefetcher);
        }
        for (int g = 0; g < kGroup; ++g) {
          for (int v = 0; v < kVectors; ++v) {
            float* to = rows + g * out_stride + v * kWidth;
            const int lanes = run - position - v * kWidth;
            // Rows of out are padded, but a field's end is the next field's beginning.
            const Vec sum =
                lanes < kWidth ? add(load_first(to, lanes), acc[g][v]) : add(load(to), acc[g][v]);
            store_first(to, sum, lanes < kWidth ? lanes : kWidth);
          }
        }
      });
    });
  }
}

// weight_sum[g] = zero * sum of the tile's weights: what codes count above their values.
inline void sum_weights(const Tile& tile, float zero, int group, TileScratch& scratch) {
  for (int g = 0; g < group; ++g) {
    Vec sum = set1(0.0f);
    for (int64_t t = 0; t < tile.padded_tokens(); t += kWidth) {
      sum = add(sum, load(scratch.weights + g * scratch.tokens + t));
    }
    scratch.weight_sum[g] = zero * reduce_add(sum);
  }
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

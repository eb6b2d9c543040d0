// Scores and values of pages of codes, with AVX-512 VNNI.
#pragma once

#include "code_rows_vnni.h"
#include "integer_weights.h"
#include "tile.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

// zero_dot: [group], in units of the query's step.
template <int kBits>
inline void score_codes(const DecodeArgs& args, const Tile& tile, const SpaceQuery& query,
                        const float* zero_dot, TileScratch& scratch, Prefetcher& prefetcher) {
  const Format& format = *tile.format;
  const int64_t row_bytes = format.key_row_bytes();
  const int run = static_cast<int>(row_bytes);
  for_code_blocks<kBits>(
      row_bytes, args.group,
      [&](auto interleave, auto heads, int g0, auto blocks, int first_field) {
        constexpr int kGroup = decltype(heads)::value, kBlocks = decltype(blocks)::value;
        for (int i = 0; i < tile.num_pages; ++i) {
          const uint8_t* page = tile.page[i];
          const auto* scales = reinterpret_cast<const BFloat16*>(page + format.scales_offset);
          float* scores = scratch.weights + g0 * scratch.tokens + i * tile.stride;
          for (int position = 0; position < run && position < tile.count[i];
               position += 16 * kBlocks) {
            CodeSums<kBits, kBlocks, kGroup> sums(first_field);
            sums.add(interleave, page + position, format.rank, query.high + g0 * query.width,
                     query.low + g0 * query.width, query.width, prefetcher);
            sums.for_vectors(run - position, [&](int vector, int block, int field) {
              const int at = position + 16 * block, token = field * run + at;
              const Vec scale = load_elements(scales + token);
              for (int g = 0; g < kGroup; ++g) {
                const Vec centred = sub(sums.total(g, vector, field), set1(zero_dot[g0 + g]));
                store_first(scores + g * scratch.tokens + token,
                            mul(centred, mul(scale, set1(query.step[g0 + g]))), run - at);
              }
            });
          }
        }
      });
}

// Adds weighted value codes to out [group, out_stride].
template <int kBits>
inline void add_code_values(const DecodeArgs& args, const Tile& tile, TileScratch& scratch,
                            float* out, int64_t out_stride, Prefetcher& prefetcher) {
  const Format& format = *tile.format;
  for (int g = 0; g < args.group; ++g) {
    const int64_t at = g * scratch.tokens;
    scratch.weight_sum[g] =
        format.zero() * split_weights(scratch.weights + at, tile.padded_tokens(),
                                      inverse_step(scratch.largest[g]), scratch.high + at,
                                      scratch.low + at);
    scratch.step[g] = scratch.largest[g] / kLargestWeight;
  }
  const int64_t row_bytes = int64_t{format.rank} * kBits / 8;
  const int run = static_cast<int>(row_bytes);
  for_code_blocks<kBits>(
      row_bytes, args.group,
      [&](auto interleave, auto heads, int g0, auto blocks, int first_field) {
        constexpr int kGroup = decltype(heads)::value, kBlocks = decltype(blocks)::value;
        for (int position = 0; position < run; position += 16 * kBlocks) {
          CodeSums<kBits, kBlocks, kGroup> sums(first_field);
          for (int i = 0; i < tile.num_pages; ++i) {
            const int64_t at = g0 * scratch.tokens + i * tile.stride;
            sums.add(interleave, tile.page[i] + format.values_offset + position, tile.count[i],
                     scratch.high + at, scratch.low + at, scratch.tokens, prefetcher);
          }
          sums.for_vectors(run - position, [&](int vector, int block, int field) {
            const int lanes = run - position - 16 * block;
            for (int g = 0; g < kGroup; ++g) {
              float* to = out + (g0 + g) * out_stride + field * run + position + 16 * block;
              const Vec centred =
                  sub(sums.total(g, vector, field), set1(scratch.weight_sum[g0 + g]));
              store_first(to, fma(centred, set1(scratch.step[g0 + g]), load_first(to, lanes)),
                          lanes);
            }
          });
        }
      });
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

// Scores and values of pages of codes, with AVX-512 VNNI.
#pragma once

#include "code_rows_vnni.h"
#include "tile.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

template <int kBits, bool kPacked, int kGroup>
MDKV_INLINE void score_codes_block(const Format& format, const uint8_t* page, int count,
                                   const RowInterleave& interleave, const SpaceQuery& query,
                                   const float* zero_dot, int g0, float* scores,
                                   int64_t scores_stride) {
  constexpr int kFields = 8 / kBits;
  const int run = static_cast<int>(interleave.row_bytes());
  const auto* scales = reinterpret_cast<const BFloat16*>(page + 2 * format.section_bytes);
  for (int position = 0; position < run && position < count; position += 16) {
    __m512i high[kGroup][kFields] = {}, low[kGroup][kFields] = {};
    add_code_rows<kBits, kPacked>(high, low, interleave, page + position, format.rank,
                                  query.high + g0 * query.width, query.low + g0 * query.width,
                                  query.width);
    for (int field = 0; field < kFields; ++field) {
      const int token = field * run + position;
      const Vec scale = load_elements(scales + token);
      for (int g = 0; g < kGroup; ++g) {
        const Vec centred =
            sub(combine<kBits>(high[g][field], low[g][field], field), set1(zero_dot[g0 + g]));
        store_first(scores + (g0 + g) * scores_stride + token,
                    mul(centred, mul(scale, set1(query.step[g0 + g]))), run - position);
      }
    }
  }
}

// zero_dot: [group], in units of the query's step.
template <int kBits>
inline void score_codes(const DecodeArgs& args, const Format& format, const Tile& tile,
                        const SpaceQuery& query, const float* zero_dot, TileScratch& scratch) {
  const RowInterleave interleave(format.section_bytes / format.rank);
  for (int i = 0; i < tile.num_pages; ++i) {
    float* scores = scratch.weights + i * tile.stride;
    for_blocks<CodeSums<kBits>::kMaxHeads>(args.group, [&](auto heads, int g0) {
      constexpr int kGroup = decltype(heads)::value;
      if (interleave.packed()) {
        score_codes_block<kBits, true, kGroup>(format, tile.page[i], tile.count[i], interleave,
                                               query, zero_dot, g0, scores, scratch.tokens);
      } else {
        score_codes_block<kBits, false, kGroup>(format, tile.page[i], tile.count[i], interleave,
                                                query, zero_dot, g0, scores, scratch.tokens);
      }
    });
  }
}

template <int kBits, bool kPacked, int kGroup>
MDKV_INLINE void add_code_values_block(const Format& format, const Tile& tile,
                                       const RowInterleave& interleave, int g0,
                                       const TileScratch& scratch, float* out, int64_t out_stride) {
  constexpr int kFields = 8 / kBits;
  const int run = static_cast<int>(interleave.row_bytes());
  for (int position = 0; position < run; position += 16) {
    __m512i high[kGroup][kFields] = {}, low[kGroup][kFields] = {};
    for (int i = 0; i < tile.num_pages; ++i) {
      const int64_t weights = g0 * scratch.tokens + i * tile.stride;
      add_code_rows<kBits, kPacked>(high, low, interleave,
                                    tile.page[i] + format.section_bytes + position, tile.count[i],
                                    scratch.high + weights, scratch.low + weights, scratch.tokens);
    }
    for (int field = 0; field < kFields; ++field) {
      for (int g = 0; g < kGroup; ++g) {
        float* to = out + (g0 + g) * out_stride + field * run + position;
        const Vec centred = sub(combine<kBits>(high[g][field], low[g][field], field),
                                set1(scratch.weight_sum[g0 + g]));
        const Vec sum = fma(centred, set1(scratch.step[g0 + g]), load_first(to, run - position));
        store_first(to, sum, run - position);
      }
    }
  }
}

// Adds weighted value codes to out [group, out_stride].
template <int kBits>
inline void add_code_values(const DecodeArgs& args, const Format& format, const Tile& tile,
                            TileScratch& scratch, float* out, int64_t out_stride) {
  for (int g = 0; g < args.group; ++g) {
    const int64_t at = g * scratch.tokens;
    scratch.step[g] = split_weights(scratch.weights + at, tile.padded_tokens(), scratch.high + at,
                                    scratch.low + at, scratch.weight_sum + g);
    scratch.weight_sum[g] *= format.zero();
  }
  const RowInterleave interleave(int64_t{format.rank} * kBits / 8);
  for_blocks<CodeSums<kBits>::kMaxHeads>(args.group, [&](auto heads, int g0) {
    constexpr int kGroup = decltype(heads)::value;
    if (interleave.packed()) {
      add_code_values_block<kBits, true, kGroup>(format, tile, interleave, g0, scratch, out,
                                                 out_stride);
    } else {
      add_code_values_block<kBits, false, kGroup>(format, tile, interleave, g0, scratch, out,
                                                  out_stride);
    }
  });
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

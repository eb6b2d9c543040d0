// The online softmax step of a tile.
#pragma once

#include "group_blocks.h"
#include "tile.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();

MDKV_INLINE void scale_row(float* row, int64_t width, float factor) {
  const Vec f = set1(factor);
  for (int64_t i = 0; i < width; i += kWidth) store(row + i, mul(load(row + i), f));
}

// Scores of lanes that hold no token must not count.
inline void mask_scores(const Tile& tile, int group, TileScratch& scratch) {
  for (int i = 0; i < tile.num_pages; ++i) {
    if (tile.count[i] == tile.stride) continue;
    for (int g = 0; g < group; ++g) {
      float* scores = scratch.weights + g * scratch.tokens + i * tile.stride;
      int64_t t = tile.count[i] / kWidth * kWidth;
      store(scores + t, blend_first(load(scores + t), set1(kMinusInfinity), tile.count[i] - t));
      for (t += kWidth; t < tile.stride; t += kWidth) store(scores + t, set1(kMinusInfinity));
    }
  }
}

// Makes the tile's scores count against a common maximum, rescaling what was summed so far.
inline void raise_maximum(const Tile& tile, int group, TileScratch& scratch, Partial& partial) {
  const int64_t padded = tile.padded_tokens();
  for (int g = 0; g < group; ++g) {
    const float* scores = scratch.weights + g * scratch.tokens;
    Vec best = load(scores);
    for (int64_t t = kWidth; t < padded; t += kWidth) best = max(best, load(scores + t));
    const float top = reduce_max(best);
    if (top > partial.max[g]) {
      const float factor = __builtin_exp2f(partial.max[g] - top);
      partial.max[g] = top;
      partial.sum[g] *= factor;
      for (int space = 0; space < 3; ++space) {
        scale_row(partial.out[space] + g * partial.width[space], partial.width[space], factor);
      }
    }
  }
}

// Turns scores into weights exp2(score - max), times the scales of the values where there are any.
//
// scales_offset: of bf16 scales [tokens] in a page; negative for none.
inline void weigh(const Tile& tile, int64_t scales_offset, int group, TileScratch& scratch,
                  Partial& partial) {
  for_blocks<kMaxGroup>(group, [&](auto heads, int g0) {
    constexpr int kGroup = decltype(heads)::value;
    Vec sum[kGroup], largest[kGroup];
    for (int g = 0; g < kGroup; ++g) sum[g] = largest[g] = set1(0.0f);
    for (int i = 0; i < tile.num_pages; ++i) {
      const auto* scales = reinterpret_cast<const BFloat16*>(tile.page[i] + scales_offset);
      float* weights = scratch.weights + g0 * scratch.tokens + i * tile.stride;
      for (int t = 0; t < tile.stride; t += kWidth) {
        // Beyond the last token a weight is zero, but a scale may be anything.
        const Vec scale =
            scales_offset < 0 ? set1(1.0f) : load_first(scales + t, tile.count[i] - t);
        for (int g = 0; g < kGroup; ++g) {
          float* at = weights + g * scratch.tokens + t;
          const Vec share = exp2(sub(load(at), set1(partial.max[g0 + g])));
          const Vec weight = mul(share, scale);
          sum[g] = add(sum[g], share);
          largest[g] = max(largest[g], weight);
          store(at, weight);
        }
      }
    }
    for (int g = 0; g < kGroup; ++g) {
      partial.sum[g0 + g] += reduce_add(sum[g]);
      scratch.largest[g0 + g] = reduce_max(largest[g]);
    }
  });
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

// The online softmax step of a tile.
#pragma once

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

// Turns scores into weights exp2(score - max), and rescales what was accumulated so far.
inline void softmax_step(const Tile& tile, int group, TileScratch& scratch, Partial& partial) {
  const int64_t padded = tile.padded_tokens();
  for (int g = 0; g < group; ++g) {
    float* weights = scratch.weights + g * scratch.tokens;
    Vec best = load(weights);
    for (int64_t t = kWidth; t < padded; t += kWidth) best = max(best, load(weights + t));
    const float top = reduce_max(best);
    if (top > partial.max[g]) {
      const float factor = __builtin_exp2f(partial.max[g] - top);
      partial.max[g] = top;
      partial.sum[g] *= factor;
      for (int space = 0; space < 3; ++space) {
        scale_row(partial.out[space] + g * partial.width[space], partial.width[space], factor);
      }
    }
    const Vec base = set1(partial.max[g]);
    Vec sum = set1(0.0f);
    for (int64_t t = 0; t < padded; t += kWidth) {
      const Vec weight = exp2(sub(load(weights + t), base));
      sum = add(sum, weight);
      store(weights + t, weight);
    }
    partial.sum[g] += reduce_add(sum);
  }
}

// Multiplies the weights by the scales of the values' codes.
//
// scales_offset: of the V scales in a page.
inline void apply_value_scales(const Tile& tile, int64_t scales_offset, int group,
                               TileScratch& scratch) {
  for (int i = 0; i < tile.num_pages; ++i) {
    const auto* scales = reinterpret_cast<const BFloat16*>(tile.page[i] + scales_offset);
    for (int t = 0; t < tile.stride; t += kWidth) {
      const Vec scale = load_first(scales + t, tile.count[i] - t);
      for (int g = 0; g < group; ++g) {
        float* weights = scratch.weights + g * scratch.tokens + i * tile.stride + t;
        store(weights, mul(load(weights), scale));
      }
    }
  }
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

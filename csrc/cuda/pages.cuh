// A page in shared memory: where its chunks are put, and a warp's view of the queries.
#pragma once

#include "softmax.cuh"

namespace mdkv {

// A number as a type, for loops at compile time.
template <int N>
struct IntConstant {
  static constexpr int value = N;
};

constexpr int kNoSwizzle = 31;

constexpr int kColumns = 32;  // bytes of every row of codes that are read at a time

// Room behind a page for sections that start at whole groups of 8 chunks.
constexpr int kPadding = 16 * kChunk;

// Chunks are moved among the 8 of their group by higher bits of their number.
MDKV_BOTH int swizzled(int chunk, int by) { return chunk ^ ((chunk >> by) & 7); }

// A group's queries as right sides of products: two words per 16 dimensions.
template <int D>
struct Query {
  uint32_t words[(D + 15) / 16][2];
  float sum[2];  // of all dimensions, per head of this thread; for codes alone
};

// A page's tokens, as one warp reads them.
struct Page {
  uint32_t at;     // where it starts in shared memory
  uint32_t zeros;  // 16 bytes of zeros
  int tokens;      // that it holds
  float scale;     // of scores
  int lane;
};

template <bool kBFloat16>
MDKV_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if (kBFloat16) {
    multiply_bfloat16(c, a, b);
  } else {
    multiply_float16(c, a, b);
  }
}

template <bool kBFloat16>
MDKV_DEVICE uint32_t pack(float low, float high) {
  return kBFloat16 ? pack_bfloat16x2(low, high) : pack_float16x2(low, high);
}

// Weights of 16 tokens, packed as a thread has them, as the right side of a product.
MDKV_DEVICE void turn_weights(uint32_t (&right)[2], uint32_t upper, uint32_t lower) {
  right[0] = transpose_matrix(upper);
  right[1] = transpose_matrix(lower);
}

}  // namespace mdkv

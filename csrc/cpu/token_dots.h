// Dot products of token-major rows with the queries of a group.
#pragma once

#include "group_blocks.h"
#include "prefetch.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

// Four rows at a time, so that their horizontal sums share shuffles.
template <typename E, int kGroup>
MDKV_INLINE void dot_rows_block(const uint8_t* rows, int64_t stride, int count,
                                const float* queries, int64_t queries_stride, int dims, float* out,
                                int64_t out_stride, Prefetcher& prefetcher) {
  const int whole = dims / kWidth * kWidth;
  for (int t = 0; t < count; t += 4) {
    const E* row[4];
    for (int i = 0; i < 4; ++i) {
      const int clamped = t + i < count ? t + i : count - 1;
      row[i] = reinterpret_cast<const E*>(rows + clamped * stride);
    }
    Vec acc[kGroup][4];
    for (int g = 0; g < kGroup; ++g) {
      for (int i = 0; i < 4; ++i) acc[g][i] = set1(0.0f);
    }
    for (int d = 0; d < whole; d += kWidth) {
      prefetcher.step((4 * kWidth * sizeof(E) + 63) / 64);
      Vec q[kGroup];
      for (int g = 0; g < kGroup; ++g) q[g] = load(queries + g * queries_stride + d);
      for (int i = 0; i < 4; ++i) {
        const Vec x = load_elements(row[i] + d);
        for (int g = 0; g < kGroup; ++g) acc[g][i] = fma(q[g], x, acc[g][i]);
      }
    }
    if (whole < dims) {
      for (int i = 0; i < 4; ++i) {
        const Vec x = load_first(row[i] + whole, dims - whole);
        for (int g = 0; g < kGroup; ++g) {
          acc[g][i] = fma(load(queries + g * queries_stride + whole), x, acc[g][i]);
        }
      }
    }
    for (int g = 0; g < kGroup; ++g) {
      float sums[4];
      reduce_add4(acc[g], sums);
      for (int i = 0; i < 4 && t + i < count; ++i) out[g * out_stride + t + i] = sums[i];
    }
  }
}

// out[g][t] = sum_d queries[g][d] * rows[t][d].
//
// rows: [count] rows of dims elements, `stride` bytes apart. queries: float [group, padded dims].
template <typename E>
inline void dot_rows(const uint8_t* rows, int64_t stride, int count, const float* queries,
                     int64_t queries_stride, int dims, int group, float* out, int64_t out_stride,
                     Prefetcher& prefetcher) {
  for_blocks<kMaxDotGroup>(group, [&](auto heads, int g0) {
    dot_rows_block<E, decltype(heads)::value>(rows, stride, count, queries + g0 * queries_stride,
                                              queries_stride, dims, out + g0 * out_stride,
                                              out_stride, prefetcher);
  });
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

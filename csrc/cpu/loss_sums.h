// Sums over window queries that make up a token's loss; mdkv_vllm/core/loss.py is the
// specification.
//
// Scores are kept [token][row], rows innermost: no key is ever transposed, and the sum over tokens
// that normalises a row needs no sum across a vector.
#pragma once

#include "kernels.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

constexpr int kTokenGroup = 4;  // tokens whose scores grow together in registers

template <int kVectors>
MDKV_INLINE void score_vectors(const Scores& scores, int rows, int first_row, int64_t begin,
                               int count, float* tile) {
  const float* queries = scores.queries + first_row;
  for (int t = 0; t < count; t += kTokenGroup) {
    const float* keys[kTokenGroup];
    for (int i = 0; i < kTokenGroup; ++i) {
      const int64_t token = begin + (t + i < count ? t + i : count - 1);
      keys[i] = scores.keys + token * scores.key_stride;
    }
    Vec sums[kTokenGroup][kVectors];
    for (int i = 0; i < kTokenGroup; ++i) {
      for (int v = 0; v < kVectors; ++v) sums[i][v] = set1(0.0f);
    }
    for (int d = 0; d < scores.rank; ++d) {
      Vec query[kVectors];
      for (int v = 0; v < kVectors; ++v) query[v] = load(queries + int64_t{d} * rows + v * kWidth);
      for (int i = 0; i < kTokenGroup; ++i) {
        const Vec key = set1(keys[i][d]);
        for (int v = 0; v < kVectors; ++v) sums[i][v] = fma(key, query[v], sums[i][v]);
      }
    }
    for (int i = 0; i < kTokenGroup; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        store(tile + int64_t{t + i} * rows + first_row + v * kWidth, sums[i][v]);
      }
    }
  }
}

// Scores of up to kScoreTile tokens from `begin` on. tile: [kScoreTile, rows].
inline void score_tile(const Scores& scores, int rows, int64_t begin, int count, float* tile) {
  int row = 0;
  for (; row + kMaxVectors * kWidth <= rows; row += kMaxVectors * kWidth) {
    score_vectors<kMaxVectors>(scores, rows, row, begin, count, tile);
  }
  for (; row + 2 * kWidth <= rows; row += 2 * kWidth) {
    score_vectors<2>(scores, rows, row, begin, count, tile);
  }
  for (; row < rows; row += kWidth) score_vectors<1>(scores, rows, row, begin, count, tile);
}

MDKV_INLINE int tile_count(int64_t begin, int64_t end) {
  return static_cast<int>(end - begin < kScoreTile ? end - begin : kScoreTile);
}

// Largest score of every row over tokens [begin, end), and the sum of powers of two relative to it.
void row_sums(const Scores& scores, const Causal& causal, int rows, int64_t begin, int64_t end,
              float* tile, float* largest, float* sum) {
  for (int r = 0; r < rows; ++r) {
    largest[r] = kHiddenScore;
    sum[r] = 0.0f;
  }
  for (; begin < end; begin += kScoreTile) {
    const int count = tile_count(begin, end);
    score_tile(scores, rows, begin, count, tile);
    for (int t = 0; t < count; ++t) {
      const int64_t hidden = (begin + t - causal.first_query) * causal.group;
      for (int r = 0; r < hidden; ++r) tile[int64_t{t} * rows + r] = kHiddenScore;
    }
    for (int r = 0; r < rows; r += kWidth) {
      const Vec before = load(largest + r);
      Vec best = before;
      for (int t = 0; t < count; ++t) best = max(best, load(tile + int64_t{t} * rows + r));
      Vec total = mul(load(sum + r), exp2(sub(before, best)));
      for (int t = 0; t < count; ++t) {
        total = add(total, exp2(sub(load(tile + int64_t{t} * rows + r), best)));
      }
      store(largest + r, best);
      store(sum + r, total);
    }
  }
}

// Writes the probability of each score over it; returns the sum over rows.
MDKV_INLINE float to_probabilities(const float* log_sum, int rows, float* scores) {
  Vec mass = set1(0.0f);
  for (int r = 0; r < rows; r += kWidth) {
    const Vec probability = exp2(sub(load(scores + r), load(log_sum + r)));
    store(scores + r, probability);
    mass = add(mass, probability);
  }
  return reduce_add(mass);
}

// How far probabilities move, summed over rows, when every token takes its candidate's scores.
MDKV_INLINE float moved_together(const float* scores, const float* probabilities,
                                 const float* log_sum, int rows) {
  Vec moved = set1(0.0f);
  for (int r = 0; r < rows; r += kWidth) {
    const Vec changed = exp2(sub(load(scores + r), load(log_sum + r)));
    moved = add(moved, abs(sub(changed, load(probabilities + r))));
  }
  return reduce_add(moved);
}

// The same when only this token does: P e / (1 + P (e - 1)), e being the change's exponential.
MDKV_INLINE float moved_alone(const float* scores, const float* probabilities, const float* log_sum,
                              int rows) {
  Vec moved = set1(0.0f);
  for (int r = 0; r < rows; r += kWidth) {
    const Vec probability = load(probabilities + r);
    // The bounds only guard against overflow, and against nothing over nothing.
    const Vec exponent = min(sub(load(scores + r), load(log_sum + r)), set1(86.0f));
    const Vec raised = exp2(exponent);
    const Vec others = max(sub(set1(1.0f), probability), set1(1e-30f));
    moved = add(moved, abs(sub(div(raised, add(raised, others)), probability)));
  }
  return reduce_add(moved);
}

// Sums over rows of tokens [begin, end).
void token_sums(const TokenSums& args, int64_t begin, int64_t end, float* tiles) {
  const int rows = args.rows;
  float* probabilities = tiles;
  float* scores = tiles + int64_t{kScoreTile} * rows;
  for (; begin < end; begin += kScoreTile) {
    const int count = tile_count(begin, end);
    score_tile(args.exact, rows, begin, count, probabilities);
    for (int t = 0; t < count; ++t) {
      args.sums[begin + t] =
          to_probabilities(args.log_sum, rows, probabilities + int64_t{t} * rows);
    }
    for (int c = 0; c < args.num_candidates; ++c) {
      score_tile(args.candidates[c], rows, begin, count, scores);
      float* sums = args.sums + (c + 1) * args.sums_stride + begin;
      for (int t = 0; t < count; ++t) {
        const int64_t at = int64_t{t} * rows;
        sums[t] = args.together ? moved_together(scores + at, probabilities + at,
                                                 args.candidate_log_sums + int64_t{c} * rows, rows)
                                : moved_alone(scores + at, probabilities + at, args.log_sum, rows);
      }
    }
  }
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

// What the kernels of compression are given, for one head at a time.
#pragma once

#include "decode_args.h"

namespace mdkv {

// Rows to be read back as codes of `bits` bits would hold them.
struct ReadBack {
  const float* rows;
  int64_t stride;
  int64_t count;
  int rank;
  int bits;
  float* read;   // [count, rank], or null
  float* error;  // squared error, [count], or null
};

constexpr int kScoreTile = 32;
constexpr float kHiddenScore = -1e30f;

// Scores of queries, float [rank, rows] in units of log2, over keys, float [tokens, rank].
// Rows are padded to kLanes with zeros.
struct Scores {
  const float* queries;
  const float* keys;
  int64_t key_stride;
  int rank;
};

// Which tokens are hidden from a row: those after its query, `group` rows being one query.
struct Causal {
  int64_t first_query;
  int64_t group;
};

struct TokenSums {
  Scores exact;
  const float* log_sum;  // [rows], in units of log2; large in padded rows
  const Scores* candidates;
  const float* candidate_log_sums;  // [num_candidates, rows]; only read where `together`
  int num_candidates;
  bool together;  // whether every token is changed at once
  int rows;
  float* sums;  // [1 + num_candidates, tokens]
  int64_t sums_stride;
};

}  // namespace mdkv

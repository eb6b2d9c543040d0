// The loss_sums operator: what the window queries say about each token, without ever writing
// out a score matrix. Work is cut at fixed tokens and merged in order, so that the result does not
// depend on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "compress_tensors.h"
#include "isa.h"

namespace mdkv {
namespace {

constexpr int64_t kChunk = 128;  // tokens of one head that a thread takes at a time
constexpr float kPaddedLogSum = 1e30f;

// Queries [heads, count, rank] to [heads, rank, rows], in units of log2.
at::Tensor transposed(const at::Tensor& queries, int64_t rows, double scale) {
  at::Tensor result = at::zeros({queries.size(0), queries.size(2), rows}, queries.options());
  result.narrow(2, 0, queries.size(1)).copy_(queries.transpose(1, 2));
  return result.mul_(scale * M_LOG2E);
}

// A set of queries and the keys they are scored against.
struct Source {
  at::Tensor queries;  // [heads, rank, rows]
  at::Tensor keys;     // [heads, tokens, rank]

  Scores of_head(int64_t head) const {
    return {queries.const_data_ptr<float>() + head * queries.stride(0), float_row(keys, head, 0),
            keys.stride(1), static_cast<int>(keys.size(2))};
  }
};

// Log2 of summed powers of two, grown a part at a time.
class LogSums {
 public:
  explicit LogSums(int64_t rows) : largest_(rows, kHiddenScore), sum_(rows, 0.0) {}

  void add(const float* largest, const float* sum) {
    for (size_t r = 0; r < sum_.size(); ++r) {
      const double best = std::max<double>(largest_[r], largest[r]);
      sum_[r] = sum_[r] * std::exp2(largest_[r] - best) + sum[r] * std::exp2(largest[r] - best);
      largest_[r] = best;
    }
  }

  void write(int64_t real_rows, float* log_sums) const {
    for (int64_t r = 0; r < static_cast<int64_t>(sum_.size()); ++r) {
      log_sums[r] =
          r < real_rows ? static_cast<float>(largest_[r] + std::log2(sum_[r])) : kPaddedLogSum;
    }
  }

 private:
  std::vector<double> largest_, sum_;
};

struct Call {
  Source exact;
  std::vector<Source> candidates;
  int64_t heads, tokens, span, real_rows, rows;
  Causal causal;
  bool together;

  int64_t span_chunks() const { return (span + kChunk - 1) / kChunk; }
  // The chunks of the span, then those of the tokens after it.
  int64_t chunks() const { return span_chunks() + (tokens - span + kChunk - 1) / kChunk; }
  int64_t chunk_begin(int64_t chunk) const {
    const int64_t after = chunk - span_chunks();
    return after < 0 ? chunk * kChunk : span + after * kChunk;
  }
  int64_t chunk_end(int64_t chunk) const {
    return std::min(chunk_begin(chunk) + kChunk, chunk < span_chunks() ? span : tokens);
  }
};

// Per head and source (exact, then candidates where they are normalised apart): log2 of the
// row's sum, [heads, sources, rows].
at::Tensor log_sums(const Call& call) {
  const int64_t sources = 1 + (call.together ? call.candidates.size() : 0);
  const int64_t chunks = call.chunks(), rows = call.rows;
  const auto options = call.exact.keys.options();
  at::Tensor parts = at::empty({call.heads, sources, chunks, 2, rows}, options);
  const auto part = [&](int64_t head, int64_t source, int64_t chunk) {
    return parts.data_ptr<float>() + ((head * sources + source) * chunks + chunk) * 2 * rows;
  };
  at::parallel_for(0, call.heads * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> tile(kScoreTile * rows);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / chunks, chunk = item % chunks;
      for (int64_t s = 0; s < (chunk < call.span_chunks() ? sources : 1); ++s) {
        const Source& source = s == 0 ? call.exact : call.candidates[s - 1];
        machine_kernels().row_sums(source.of_head(head), call.causal, static_cast<int>(rows),
                                   call.chunk_begin(chunk), call.chunk_end(chunk), tile.data(),
                                   part(head, s, chunk), part(head, s, chunk) + rows);
      }
    }
  });
  at::Tensor result = at::empty({call.heads, sources, rows}, options);
  for (int64_t head = 0; head < call.heads; ++head) {
    for (int64_t s = 0; s < sources; ++s) {
      LogSums sums(rows);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        // After the span nothing changes, whatever the candidate.
        const float* from = part(head, chunk < call.span_chunks() ? s : 0, chunk);
        sums.add(from, from + rows);
      }
      sums.write(call.real_rows, result.data_ptr<float>() + (head * sources + s) * rows);
    }
  }
  return result;
}

// queries: float32 [heads, rows, head_size], rows of one query token side by side. keys: float32
// [heads, tokens, head_size]. candidate_queries: [heads, rows, rank] each. candidate_keys:
// [heads, span, rank] each. Returns float32 [1 + candidates, heads, span]: the probability that
// falls to each token, then by how much each candidate moves it, summed over rows.
at::Tensor loss_sums(const at::Tensor& queries, const at::Tensor& keys,
                     at::TensorList candidate_queries, at::TensorList candidate_keys, int64_t span,
                     int64_t group, double scale, bool together) {
  check_float_rows(queries, "queries");
  check_float_rows(keys, "keys");
  TORCH_CHECK(candidate_queries.size() == candidate_keys.size(), "candidate_keys: expected ",
              candidate_queries.size(), ", got ", candidate_keys.size());
  TORCH_CHECK(queries.size(0) == keys.size(0) && queries.size(2) == keys.size(2), "queries: shape ",
              queries.sizes(), " does not go with keys of ", keys.sizes());
  TORCH_CHECK(group > 0 && queries.size(1) % group == 0, "group: ", group, " does not divide ",
              queries.size(1), " rows");
  Call call{};
  call.heads = keys.size(0);
  call.tokens = keys.size(1);
  call.span = span;
  call.real_rows = queries.size(1);
  call.rows = round_up(call.real_rows, kLanes);
  call.causal = {call.tokens - call.real_rows / group, group};
  call.together = together;
  TORCH_CHECK(span >= 0 && span <= call.causal.first_query, "span: ", span, " of ", call.tokens,
              " tokens reaches into the window");
  call.exact = {transposed(queries, call.rows, scale), keys};
  for (size_t c = 0; c < candidate_keys.size(); ++c) {
    const at::Tensor &own_queries = candidate_queries[c], &own_keys = candidate_keys[c];
    check_float_rows(own_queries, "candidate_queries");
    check_float_rows(own_keys, "candidate_keys");
    TORCH_CHECK(own_queries.size(0) == call.heads && own_queries.size(1) == call.real_rows &&
                    own_keys.size(0) == call.heads && own_keys.size(1) == span &&
                    own_keys.size(2) == own_queries.size(2),
                "candidate_keys: shapes ", own_queries.sizes(), " and ", own_keys.sizes());
    call.candidates.push_back({transposed(own_queries, call.rows, scale), own_keys});
  }
  const at::Tensor sums_of_rows = log_sums(call);
  const int64_t candidates = call.candidates.size(), chunks = call.span_chunks();
  at::Tensor result = at::empty({1 + candidates, call.heads, span}, keys.options());
  at::parallel_for(0, call.heads * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> tiles(2 * kScoreTile * call.rows);
    std::vector<Scores> scores(candidates);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / chunks, chunk = item % chunks;
      for (int64_t c = 0; c < candidates; ++c) scores[c] = call.candidates[c].of_head(head);
      TokenSums args{};
      args.exact = call.exact.of_head(head);
      args.log_sum = sums_of_rows.const_data_ptr<float>() + head * sums_of_rows.stride(0);
      args.candidates = scores.data();
      args.candidate_log_sums = args.log_sum + call.rows;
      args.num_candidates = static_cast<int>(candidates);
      args.together = together;
      args.rows = static_cast<int>(call.rows);
      args.sums = result.data_ptr<float>() + head * span;
      args.sums_stride = call.heads * span;
      machine_kernels().token_sums(args, call.chunk_begin(chunk), call.chunk_end(chunk),
                                   tiles.data());
    }
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(mdkv, CPU, m) { m.impl("loss_sums", &loss_sums); }

}  // namespace mdkv

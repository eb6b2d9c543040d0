// The best filling of one head's lists, kept best while their sizes change;
// mdkv_vllm/core/exchange.py is the specification, step for step.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

namespace mdkv {

constexpr int kMaxOptions = 17;  // formats, and drop

using Counts = std::array<int64_t, kMaxOptions>;

class Exchange {
 public:
  // losses: [options, span] with a stride between options. option: [span], optimal for its counts.
  Exchange(const float* losses, int64_t stride, int options, int64_t span, const uint8_t* option)
      : losses_(losses),
        stride_(stride),
        options_(options),
        option_(option, option + span),
        heaps_(options * options) {
    float largest = 0.0f;
    for (int64_t t = 0; t < span; ++t) {
      ++counts_[option[t]];
      objective_ += loss(option[t], t);
      for (int o = 0; o < options; ++o)
        largest = std::max(largest, std::abs(losses[o * stride + t]));
    }
    rounding_ = 1e-12 * largest;
    for (int64_t t = 0; t < span; ++t) {
      for (int b = 0; b < options; ++b) {
        if (b != option[t]) heap(option[t], b).push_back(move_of(t, option[t], b));
      }
    }
    for (auto& heap : heaps_) std::make_heap(heap.begin(), heap.end(), std::greater<>());
  }

  double objective() const { return objective_; }
  const Counts& counts() const { return counts_; }
  const std::vector<uint8_t>& option() const { return option_; }

  // Makes every option hold that many tokens; they must sum to the span.
  void move_to(const Counts& counts) {
    for (int to = 0; to < options_; ++to) {
      while (counts_[to] < counts[to]) grow(to, counts);
    }
  }

 private:
  struct Move {
    double gain;
    int32_t token;
    bool operator>(const Move& other) const {
      return gain > other.gain || (gain == other.gain && token > other.token);
    }
  };
  using Heap = std::vector<Move>;

  float loss(int option, int64_t token) const { return losses_[option * stride_ + token]; }
  Heap& heap(int a, int b) { return heaps_[a * options_ + b]; }
  Move move_of(int64_t token, int a, int b) const {
    return {double{loss(b, token)} - double{loss(a, token)}, static_cast<int32_t>(token)};
  }

  Move cheapest(int a, int b) {
    Heap& moves = heap(a, b);
    while (!moves.empty() && option_[moves.front().token] != a) {
      std::pop_heap(moves.begin(), moves.end(), std::greater<>());
      moves.pop_back();
    }
    return moves.empty() ? Move{std::numeric_limits<double>::infinity(), -1} : moves.front();
  }

  // Brings an option one token from whichever option above its count is nearest.
  void grow(int to, const Counts& counts) {
    Move edges[kMaxOptions][kMaxOptions];
    double distance[kMaxOptions];
    int following[kMaxOptions];
    for (int a = 0; a < options_; ++a) {
      distance[a] = a == to ? 0.0 : std::numeric_limits<double>::infinity();
      following[a] = to;
      for (int b = 0; b < options_; ++b) {
        if (a != b) edges[a][b] = cheapest(a, b);
      }
    }
    bool shorter = true;
    for (int round = 1; shorter && round < options_; ++round) {
      shorter = false;
      for (int a = 0; a < options_; ++a) {
        if (a == to) continue;
        for (int b = 0; b < options_; ++b) {
          if (a == b) continue;
          const double length = edges[a][b].gain + distance[b];
          if (length < distance[a] - rounding_) {
            distance[a] = length;
            following[a] = b;
            shorter = true;
          }
        }
      }
    }
    int at = -1;
    for (int a = 0; a < options_; ++a) {
      if (counts_[a] > counts[a] && (at < 0 || distance[a] < distance[at])) at = a;
    }
    objective_ += distance[at];
    --counts_[at];
    ++counts_[to];
    while (at != to) {
      const int next = following[at];
      reassign(edges[at][next].token, next);
      at = next;
    }
  }

  void reassign(int64_t token, int option) {
    option_[token] = static_cast<uint8_t>(option);
    for (int b = 0; b < options_; ++b) {
      if (b == option) continue;
      Heap& moves = heap(option, b);
      moves.push_back(move_of(token, option, b));
      std::push_heap(moves.begin(), moves.end(), std::greater<>());
    }
  }

  const float* losses_;
  int64_t stride_;
  int options_;
  std::vector<uint8_t> option_;
  // Entries of tokens that have left an option stay until they reach the top.
  std::vector<Heap> heaps_;
  Counts counts_{};
  double objective_ = 0.0;
  double rounding_ = 0.0;
};

}  // namespace mdkv

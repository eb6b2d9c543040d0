// The allocation in which a token may take any share of a page; mdkv_vllm/core/allocate.py
// is the specification.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "exchange.h"

namespace mdkv {

// One layer's losses, float [options, heads, span].
struct LayerLosses {
  const float* data;
  int options;
  int64_t heads;
  int64_t span;
  // Tokens per page of each option; 0 for drop.
  Counts capacity;

  int64_t stride() const { return heads * span; }
  double cost(int option) const {
    return capacity[option] > 0 ? 1.0 / static_cast<double>(capacity[option]) : 0.0;
  }
};

struct Lagrangian {
  std::vector<uint8_t> option;  // [heads, span]
  std::vector<Counts> wanted;   // per head: tokens each option wants
  double lower_bound;
};

Lagrangian solve_lagrangian(const LayerLosses& layer, int64_t num_pages);

}  // namespace mdkv

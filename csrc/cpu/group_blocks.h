// Query heads of a group are taken a few at a time, so that their accumulators stay in registers.
#pragma once

#include "decode_args.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

template <int n>
struct Int {
  static constexpr int value = n;
};

constexpr int kMaxGroup = 4;

// Calls body(Int<n>, first) with n <= kMax for consecutive runs of `count`, as even as can be.
template <int kMax, typename Body>
MDKV_INLINE void for_blocks(int count, Body body) {
  static_assert(kMax <= 4, "add a case");
  int blocks = (count + kMax - 1) / kMax;
  for (int first = 0; first < count; --blocks) {
    const int n = (count - first + blocks - 1) / blocks;
    switch (n) {
      case 1:
        body(Int<1>{}, first);
        break;
      case 2:
        if constexpr (kMax >= 2) body(Int<2>{}, first);
        break;
      case 3:
        if constexpr (kMax >= 3) body(Int<3>{}, first);
        break;
      default:
        if constexpr (kMax >= 4) body(Int<4>{}, first);
        break;
    }
    first += n;
  }
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

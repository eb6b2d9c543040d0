// Merges the parts of a unit and brings the sum back to the model's space.
#pragma once

#include "float_rows.h"
#include "lease.h"
#include "softmax.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

constexpr float kLn2 = 0.6931471805599453f;

// Merges all parts into the first; its sums are then divided by the total weight.
inline void merge(const DecodeArgs& args, Partial* parts, int64_t num_parts) {
  Partial& whole = parts[0];
  for (int g = 0; g < args.group; ++g) {
    float top = kMinusInfinity;
    for (int64_t p = 0; p < num_parts; ++p) top = parts[p].max[g] > top ? parts[p].max[g] : top;
    float total = 0.0f;
    for (int64_t p = 0; p < num_parts; ++p) {
      // Not `> 0`: a sum that is no number must show.
      const float factor = parts[p].sum[g] != 0.0f ? __builtin_exp2f(parts[p].max[g] - top) : 0.0f;
      total += factor * parts[p].sum[g];
      for (int space = 0; space < 3; ++space) {
        const int64_t width = whole.width[space];
        float* to = whole.out[space] + g * width;
        if (p == 0) {
          scale_row(to, width, factor);
          continue;
        }
        const float* from = parts[p].out[space] + g * width;
        for (int64_t i = 0; i < width; i += kWidth) {
          store(to + i, fma(set1(factor), load(from + i), load(to + i)));
        }
      }
    }
    for (int space = 0; space < 3; ++space) {
      const int64_t width = whole.width[space];
      scale_row(whole.out[space] + g * width, width, total != 0.0f ? 1.0f / total : 0.0f);
    }
    whole.max[g] = top;
    whole.sum[g] = total;
  }
}

template <typename E>
inline void write_row(const float* from, int dims, char* row) {
  E* to = reinterpret_cast<E*>(row);
  int d = 0;
  for (; d + kWidth <= dims; d += kWidth) store_elements(to + d, load(from + d));
  for (; d < dims; ++d) to[d] = from_float<E>(from[d]);
}

inline void finish(const DecodeArgs& args, const Unit& unit, Partial* parts, int64_t num_parts,
                   TileScratch& scratch) {
  merge(args, parts, num_parts);
  const Partial& whole = parts[0];
  if (uses(args, unit, MDKV_BASIS)) {
    add_product(basis_rows(args, unit, 1, scratch), args.basis_rank, args.head_size, whole.out[1],
                whole.width[1], args.group, whole.out[0], whole.width[0]);
  }
  if (uses(args, unit, MDKV_HADAMARD)) {
    add_product(args.hadamard, args.head_size, args.head_size, whole.out[2], whole.width[2],
                args.group, whole.out[0], whole.width[0]);
  }
  for (int g = 0; g < args.group; ++g) {
    const int64_t head = int64_t{unit.head} * args.group + g;
    char* row = args.output.row(unit.query, head);
    const float* from = whole.out[0] + g * whole.width[0];
    if (args.output.type == Element::kFloat32) write_row<float>(from, args.head_size, row);
    if (args.output.type == Element::kBFloat16) write_row<BFloat16>(from, args.head_size, row);
    if (args.output.type == Element::kFloat16) write_row<Half>(from, args.head_size, row);
    if (args.lse != nullptr) {
      args.lse[unit.query * args.num_kv_heads * args.group + head] =
          whole.sum[g] != 0.0f ? kLn2 * (whole.max[g] + __builtin_log2f(whole.sum[g]))
                               : kMinusInfinity;
    }
  }
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

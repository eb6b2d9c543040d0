// Queries of a unit in every space that its formats use.
#pragma once

#include "element_pages.h"
#include "lease.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

template <typename E>
inline void read_query(const char* row, int dims, float scale, float* out) {
  const E* from = reinterpret_cast<const E*>(row);
  for (int d = 0; d < dims; ++d) out[d] = to_float(from[d]) * scale;
}

inline void clear(float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = 0.0f;
}

inline void load_queries(const DecodeArgs& args, const Unit& unit, const SpaceQuery& to) {
  clear(to.exact, args.group * to.width);
  for (int g = 0; g < args.group; ++g) {
    const char* row = args.query.row(unit.query, int64_t{unit.head} * args.group + g);
    float* out = to.exact + g * to.width;
    const float scale = args.scale * kLog2E;  // so that weights are powers of two
    if (args.query.type == Element::kFloat32) read_query<float>(row, args.head_size, scale, out);
    if (args.query.type == Element::kBFloat16)
      read_query<BFloat16>(row, args.head_size, scale, out);
    if (args.query.type == Element::kFloat16) read_query<Half>(row, args.head_size, scale, out);
  }
}

// The sum of a query's first dimensions, in the unit in which a code format is scored.
MDKV_INLINE float sum_query(const SpaceQuery& query, int64_t g, int rank) {
  float sum = 0.0f;
  for (int64_t i = g * query.width; i < g * query.width + rank; ++i) {
#ifdef MDKV_VNNI
    sum += static_cast<float>(256 * query.high[i] + query.low[i]);
#else
    sum += query.exact[i];
#endif
  }
  return sum;
}

// What a query makes of the offset of codes, so that kernels may read codes as unsigned numbers.
inline void prepare_codes(const DecodeArgs& args, const Unit& unit, Prepared& prepared) {
#ifdef MDKV_VNNI
  constexpr int32_t kRotations[] = {MDKV_BASIS, MDKV_HADAMARD};
  for (const int32_t rotation : kRotations) {
    if (!uses(args, unit, rotation)) continue;
    const SpaceQuery& query = prepared.spaces[rotation];
    for (int g = 0; g < args.group; ++g) {
      const int64_t at = g * query.width;
      const float largest = largest_weight(query.exact + at, query.width);
      split_weights(query.exact + at, query.width, inverse_step(largest), query.high + at,
                    query.low + at);
      query.step[g] = largest / kLargestWeight;
    }
  }
#endif
  for (int f = 0; f < args.num_formats; ++f) {
    const Format& format = args.formats[f];
    if (!format.codes() || unit.list_pages[f] == 0) continue;
    const SpaceQuery& query = prepared.spaces[format.rotation];
    for (int g = 0; g < args.group; ++g) {
      prepared.zero_dot[f * args.group + g] = format.zero() * sum_query(query, g, format.rank);
    }
  }
}

inline void prepare(const DecodeArgs& args, const Unit& unit, TileScratch& scratch,
                    Prepared& prepared) {
  const SpaceQuery& query = prepared.spaces[0];
  load_queries(args, unit, query);
  const SpaceQuery& low = prepared.spaces[1];
  if (uses(args, unit, MDKV_BASIS)) {
    Prefetcher none(nullptr, nullptr, 0);
    clear(low.exact, args.group * low.width);
    dot_rows<float>(reinterpret_cast<const uint8_t*>(basis_rows(args, unit, 0, scratch)),
                    int64_t{args.head_size} * 4, args.basis_rank, query.exact, query.width,
                    args.head_size, args.group, low.exact, low.width, none);
  }
  const SpaceQuery& rotated = prepared.spaces[2];
  if (uses(args, unit, MDKV_HADAMARD)) {
    clear(rotated.exact, args.group * rotated.width);
    add_product(args.hadamard, args.head_size, args.head_size, query.exact, query.width, args.group,
                rotated.exact, rotated.width);
  }
  prepare_codes(args, unit, prepared);
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv

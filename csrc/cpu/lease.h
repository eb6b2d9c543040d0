// Where a unit's pages lie.
#pragma once

#include "decode_scratch.h"

namespace mdkv {
namespace MDKV_ISA {
namespace {

// A page of the lease that starts at block-table entry `first` of a row.
MDKV_INLINE const uint8_t* lease_page(const DecodeArgs& args, int64_t row, int64_t first,
                                      int64_t page) {
  const int64_t block = first + page / args.pages_per_block;
  return args.block(row, block) + page % args.pages_per_block * args.page_bytes;
}

MDKV_INLINE const uint8_t* tail_page(const DecodeArgs& args, const Unit& unit, int64_t block) {
  const int64_t page = int64_t{args.layer} * args.num_kv_heads + unit.head;
  return args.block(unit.row, block) + page * args.page_bytes;
}

inline bool uses(const DecodeArgs& args, const Unit& unit, int32_t rotation) {
  for (int f = 0; f < args.num_formats; ++f) {
    if (args.formats[f].rotation == rotation && unit.list_pages[f] > 0) return true;
  }
  return false;
}

template <typename E>
inline void read_basis_row(const uint8_t* bytes, int dims, float* out) {
  const E* row = reinterpret_cast<const E*>(bytes);
  for (int d = 0; d < dims; ++d) out[d] = to_float(row[d]);
}

// A head's basis of keys (side 0) or values (side 1) in a lease, as floats [basis_rank, head_size].
inline void read_prompt_basis(const DecodeArgs& args, int64_t row, int64_t first_block,
                              int32_t head, int side, float* basis) {
  const int64_t rank = args.basis_rank, dims = args.head_size;
  const int64_t place = int64_t{args.layer} * args.num_kv_heads + head;
  const int64_t first = args.basis_first_page + place * args.basis_pages_per_head;
  // A page is a whole number of rows, so no row crosses from one page to the next.
  const int64_t row_bytes = dims * element_bytes(args.cache_type);
  for (int64_t r = 0; r < rank; ++r) {
    const int64_t at = (side * rank + r) * row_bytes;
    const uint8_t* bytes =
        lease_page(args, row, first_block, first + at / args.page_bytes) + at % args.page_bytes;
    float* out = basis + r * dims;
    if (args.cache_type == Element::kFloat32) read_basis_row<float>(bytes, args.head_size, out);
    if (args.cache_type == Element::kBFloat16) read_basis_row<BFloat16>(bytes, args.head_size, out);
    if (args.cache_type == Element::kFloat16) read_basis_row<Half>(bytes, args.head_size, out);
  }
}

// A unit's basis of keys (side 0) or values (side 1): float [basis_rank, head_size].
inline const float* basis_rows(const DecodeArgs& args, const Unit& unit, int side,
                               TileScratch& scratch) {
  const int64_t size = int64_t{args.basis_rank} * args.head_size;
  if (!args.prompt_basis) return (side ? args.basis_v : args.basis_k) + unit.head * size;
  read_prompt_basis(args, unit.row, unit.leases[0], unit.head, side, scratch.basis);
  return scratch.basis;
}

}  // namespace
}  // namespace MDKV_ISA
}  // namespace mdkv
